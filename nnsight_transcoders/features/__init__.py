"""What features respond to on a text: statistics, examples, labels, dashboards."""

"""The interactive page of an attribution graph: one HTML document that needs no network."""

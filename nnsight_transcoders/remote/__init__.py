"""Remote models: what travels to an NDIF server, what comes back, and what to do when it fails."""

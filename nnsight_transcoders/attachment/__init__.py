"""Transcoders inside an nnsight model, here or on a server (``edit`` is the entry)."""

"""Circuits: collect a run, write it as a linear map, attribute, prune."""

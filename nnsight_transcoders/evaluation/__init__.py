"""What a transcoder set is worth: ``verifying`` (does it fit), ``measuring``, Pareto sweeps."""

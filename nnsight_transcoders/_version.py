"""The package version: read by the build and by ``nnsight_transcoders.__version__``."""

__version__ = "0.1.0.dev0"

"""The run: configuration, models, adapters, loop, checkpoints, exports and the command line."""

__version__ = "0.1.0"

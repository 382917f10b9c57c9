"""The run: configuration, models, adapters, loop, checkpoints, exports and the command line."""

import logging
import os

__version__ = "0.1.0"

# Other libraries give advice about packages that are not used here while they are imported; their errors still show.
for library in ("xformers", "bitsandbytes"):
    logging.getLogger(library).setLevel(logging.ERROR)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

"""Imported once, by the process that others are forked from: what a first run loads and a second one finds there.

No gradient is computed here: autograd's threads would not survive a fork.
"""

from __future__ import annotations

import gc

import torch
from PIL import Image

from lorasmith.trainer import cli, console, queue, run  # noqa: F401
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.clients import reading  # noqa: F401
from lorasmith.trainer.models import load_base

torch.set_num_threads(1)
Image.init()
_pocket = inspect_base("pocket")
skeleton(_pocket)
load_base(_pocket).pipeline()
gc.freeze()  # no child looks for garbage here, nor gets a copy of it for having looked

"""What makes a process of ours start sooner: to import torch, diffusers, transformers and PEFT is most of a short one.

It is for a process that is ours alone, and without effect on what it computes.
"""

from __future__ import annotations

import gc
import importlib
import sys
from importlib.machinery import PathFinder
from types import ModuleType

_LATER = "bitsandbytes"
"""diffusers, transformers and PEFT import it wherever it is installed, and it imports the compiler of PyTorch. Some
optimizers need it, and a base in 4 bits; they import it when they are asked for."""


_USUAL = gc.get_threshold()


def start_quickly() -> None:
    """Let no import wait for bitsandbytes, nor for a search for garbage: some thousand modules make none."""
    if _LATER not in sys.modules:
        sys.modules[_LATER] = None  # pyright: ignore[reportArgumentType]
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


def started() -> None:
    """For what goes on for days, and makes garbage: search for it as usual, but not in what was made until now."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


def import_late(module: str) -> ModuleType:
    """Import a module that `start_quickly` may have put off, or one of another library."""
    if module.partition(".")[0] == _LATER and sys.modules.get(_LATER, module) is None:
        del sys.modules[_LATER]
    return importlib.import_module(module)


def is_installed(library: str) -> bool:
    """Whether a library could be imported, though it may have been put off."""
    return PathFinder.find_spec(library) is not None

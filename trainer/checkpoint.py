"""`TrainState`: everything that is needed to continue as if nothing had happened.

Order, noise, time-steps and caption dropout are functions of (seed, step), so no random generator has to be stored.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import RunError
from .files import atomic_folder
from .jobs import RunFolder

VERSION = 2


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0
    images: int = 0
    """Images seen."""
    dataset: str = ""
    """Fingerprint of what is trained on; another one is refused at resume."""
    base: str = ""
    """Identity of the base model."""
    version: int = VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from disk."""

    state: TrainState
    adapter: dict[str, Tensor]
    """What was trained, as it is to be used: adapters, or weights of the base itself."""
    optimizer: dict[str, Any]
    """The optimizer's state, and that of the gradient scaler and of `averages` where there are such."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """With averages, which `adapter` then holds: the weights that training goes on from."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the folder appears by rename, so it is whole or absent."""
    with atomic_folder(folder) as temporary:
        save_file(checkpoint.adapter, temporary / _ADAPTER)
        if checkpoint.trained:
            save_file(checkpoint.trained, temporary / "trained.safetensors")
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(checkpoint.state), indent=2) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is ever executed.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        state = load_state(folder)
        adapter = _load_tensors(folder / _ADAPTER)
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        trained = _load_tensors(folder / "trained.safetensors") if "averages" in optimizer else {}
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error
    return Checkpoint(state, adapter, optimizer, trained)


def load_state(folder: Path) -> TrainState:
    """Where a checkpoint stands, without its weights.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return TrainState(**{f.name: values[f.name] for f in fields(TrainState)})
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error


def open_adapter(folder: Path) -> Any:
    """What was trained, as an open safetensors file, of which each tensor is read when it is asked for.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        return safe_open(folder / _ADAPTER, framework="pt")
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error


_ADAPTER = "adapter.safetensors"


def _damaged(folder: Path, error: Exception) -> RunError:
    return RunError(f"cannot be read ({error})", str(folder), "Remove this folder; an earlier one is then used.")


_SIGNS_OF_DAMAGE = (
    *(OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError),  # of the files
    *(ValueError, KeyError, TypeError),  # of what stands in them
)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """Copies: tensors mapped into the file would keep it open, and on Windows an open file cannot be pruned."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def prune_checkpoints(run: RunFolder, keep: str | int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    if isinstance(keep, int):
        for step in run.saved_steps()[:-keep]:
            shutil.rmtree(run.checkpoint(step))

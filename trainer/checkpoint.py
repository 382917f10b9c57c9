"""`TrainState`: everything that is needed to continue as if nothing had happened.

Order, noise, time-steps, dropout and the learning rate are functions of the seed, the step and the length of the run.
So neither random generators nor a schedule have to be stored, and the step is the position in the order of images.

What is read is compared with its checksum first; `state.json` holds that of each other file, and one of itself.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import RunError, TrainingError, first_line
from .files import atomic_folder, remove_folder, sha256_of
from .jobs import RunFolder
from .origin import Origin

VERSION = 3
"""Of the format. A run goes on from this one only. Of earlier ones, which had no checksums, the weights are read."""
_CHECKED_SINCE = 3


@dataclass
class TrainState:
    """Where a run stands. What a later version adds needs a default, which is taken where a file lacks it."""

    step: int = 0
    images: int = 0
    """Images seen."""
    steps: int = 0
    """The whole run's, when this was saved: the learning rate has followed the schedule of so many."""
    at_once: int = 0
    """Images in one forward and backward pass, since the memory was full with more; 0: whole batches."""
    best_step: int = 0
    """With the lowest validation loss, or the best scores; 0: none yet."""
    best_losses: list[float] = field(default_factory=list)
    """Of each of its predictions."""
    best_of: str = ""
    """A hash of what was predicted, or drawn and scored."""
    scored: list[list[float]] = field(default_factory=list)
    """Style, prompt and copying of each validation so far, where it is by scores."""
    not_lower: int = 0
    """How many validations in a row have not been better since."""
    config: str = ""
    """Hash of the settings that decide the result; `origin.json` holds what this and the next are hashes of."""
    dataset: str = ""
    """Fingerprint of what is trained on."""
    base: str = ""
    """Identity of the base model."""
    attention: dict[str, str] = field(default_factory=dict)
    """The kernel of each shape of attention, where it was found by a probe."""
    attention_on: str = ""
    """On which device, and with which PyTorch."""
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
    origin: Origin = field(default_factory=Origin)
    """What it was trained from."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the folder appears by rename, so it is whole or absent.

    Raises:
        TrainingError: if the disk does not take it; earlier ones stand.
    """
    try:
        with atomic_folder(folder) as temporary:
            save_file(checkpoint.adapter, temporary / _ADAPTER)
            if checkpoint.trained:
                save_file(checkpoint.trained, temporary / "trained.safetensors")
            torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
            (temporary / _ORIGIN).write_text(json.dumps(asdict(checkpoint.origin)), encoding="utf-8")
            (temporary / _STATE).write_text(_told_of(temporary, checkpoint.state), encoding="utf-8")
    except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own word for a full disk
        raise TrainingError(
            f"the checkpoint cannot be written ({first_line(error)})",
            str(folder),
            f"Make room on the disk, then: lorasmith resume {folder.parent.parent}",
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is ever executed.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        state, sums = _read_state(folder)
        for file in sums:
            _verify(folder / file, sums)
        adapter = _load_tensors(folder / _ADAPTER)
        optimizer = _load_optimizer(folder / "optimizer.pt")
        trained = _load_tensors(folder / "trained.safetensors") if "averages" in optimizer else {}
        origin = Origin.from_json(json.loads((folder / _ORIGIN).read_bytes())) if sums else Origin()
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error
    return Checkpoint(state, adapter, optimizer, trained, origin)


def load_state(folder: Path) -> TrainState:
    """Where a checkpoint stands, without its weights.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        return _read_state(folder)[0]
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error


def open_adapter(folder: Path) -> Any:
    """What was trained, as an open safetensors file, of which each tensor is read when it is asked for. The file is
    verified, which takes a fraction of what drawing one picture takes.

    Raises:
        RunError: if it is incomplete or damaged.
    """
    try:
        _verify(folder / _ADAPTER, _read_state(folder)[1])
        return safe_open(folder / _ADAPTER, framework="pt")
    except _SIGNS_OF_DAMAGE as error:
        raise _damaged(folder, error) from error


_ADAPTER, _ORIGIN, _STATE = "adapter.safetensors", "origin.json", "state.json"
_SUMS, _OWN_SUM = "sha256", "sha256_of_state"


def _told_of(folder: Path, state: TrainState) -> str:
    """What the last file of a checkpoint says: the state, and the checksums of the files that are there already."""
    values = asdict(state) | {_SUMS: {file.name: sha256_of(file) for file in sorted(folder.iterdir())}}
    return json.dumps(values | {_OWN_SUM: _sum(values)}, indent=2) + "\n"


def _read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    """The state, and the checksums of the other files; an earlier version told none."""
    values: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if values["version"] >= _CHECKED_SINCE and values.pop(_OWN_SUM) != _sum(values):
        raise ValueError(f"{_STATE} is not as it was written")
    known = {f.name: values[f.name] for f in fields(TrainState) if f.name in values}
    return TrainState(**known), values.get(_SUMS, {})


def _sum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _verify(file: Path, sums: dict[str, str]) -> None:
    """Compare a file with its checksum, where there is one."""
    if file.name in sums and sha256_of(file) != sums[file.name]:
        raise ValueError(f"{file.name} is not as it was written")


def _damaged(folder: Path, error: Exception) -> RunError:
    return RunError(f"cannot be read ({error})", str(folder), "Remove this folder; an earlier one is then used.")


_SIGNS_OF_DAMAGE = (
    *(OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError),  # of the files
    # of what stands in them, which may be of anybody who shares a run
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError, struct.error),
)


def _load_optimizer(file: Path) -> dict[str, Any]:
    """torch builds tensors and plain containers only, and calls nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; what torch cannot read, it raises
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """Copies: tensors mapped into the file would keep it open, and on Windows an open file cannot be pruned."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def prune_checkpoints(run: RunFolder, keep: str | int, best: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints, and that of the `best` step."""
    if isinstance(keep, int):
        for step in run.saved_steps()[:-keep]:
            if step == best:
                continue
            with suppress(PermissionError):  # somebody reads it, on Windows: the next time will do
                remove_folder(run.checkpoint(step))

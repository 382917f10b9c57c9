"""`events.jsonl`: what happened in a run, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, InstanceOf, TypeAdapter

from .files import flush_folder

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""In a log, `null` stands for what is no number."""
Text = InstanceOf[str]
"""Any, also with half a letter of a file's name in it."""


@dataclass(frozen=True)
class Event:
    """Something that happened; `type` is its name in the file."""

    type: ClassVar[str]


@dataclass(frozen=True)
class Phase(Event):
    """The run does something that takes time; `total` is 0 where it cannot be counted."""

    type: ClassVar[str] = "phase"
    name: Text
    done: Count = 0
    total: Count = 0


@dataclass(frozen=True)
class PlanMade(Event):
    """What will be done: the plan's facts, and what is trained."""

    type: ClassVar[str] = "plan"
    steps: Count
    images: Count
    plan: dict[Text, Any] = field(default_factory=dict)
    parts: list[dict[Text, Any]] = field(default_factory=list)
    every: dict[Text, Count] = field(default_factory=dict)
    """Steps between previews, `sample`, between checkpoints, `save`, between measures of the `validation` loss,
    and between pictures that are scored, `scores`; 0: never, of checkpoints only at the end."""


@dataclass(frozen=True)
class AttentionChosen(Event):
    """It was found which kernel is the fastest for each shape of the UNet's attention, or a run that goes on takes what
    it took before."""

    type: ClassVar[str] = "attention"
    device: Text
    """With the version of PyTorch."""
    shapes: list[dict[Text, Any]]
    """Of each its `shape`, and the `kernel` that is taken; where it was probed just now, the `milliseconds` of each
    kernel, and why others were `left_out`."""


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. `images` counts from the start of the run."""

    type: ClassVar[str] = "step"
    step: Count
    images: Count
    loss: Number
    grad_norm: Number
    lr: dict[Text, Number]
    seconds: Number
    memory_mib: Number = 0.0
    """The most that was used so far of the GPU's memory; without one, what the process uses of the computer's. 0 in
    logs of earlier versions, which did not say."""


@dataclass(frozen=True)
class Sampled(Event):
    """Previews were drawn."""

    type: ClassVar[str] = "sample"
    step: Count
    folder: Text
    prompts: list[Text]


@dataclass(frozen=True)
class Validated(Event):
    """The validation loss was measured: the same images, time-steps and noise as at the steps before."""

    type: ClassVar[str] = "validation"
    step: Count
    bands: list[Text]
    """The first and last time-step of each band, as `0-249`."""
    validation: list[Number]
    """The mean loss in each band: of images that are held out, or where none are, of training images."""
    train: list[Number]
    """Likewise of training images with the same noise; empty where no image is held out."""
    held_out: Count
    """Images."""
    predictions: Count
    """How often the model was asked."""
    of: Text
    """A hash of all that was measured. Losses that differ in it cannot be compared."""
    best: Count = 0
    """The step whose loss is the lowest so far, by more than its noise; 0: none but that of the untouched base."""

    @property
    def loss(self) -> float:
        """Over all bands."""
        return sum(self.validation) / len(self.validation) if self.validation else math.nan

    @property
    def gaps(self) -> list[float]:
        """By how much images that are held out are predicted worse, in each band."""
        return [mine - theirs for mine, theirs in zip(self.validation, self.train, strict=False)]


@dataclass(frozen=True)
class Scored(Event):
    """Pictures of the same prompts and noise as at the steps before were scored, each score the mean over them."""

    type: ClassVar[str] = "scores"
    step: Count
    style: Number
    """0: as the base draws; 1: as near to the training images as these are to each other."""
    prompt: Number
    """1: the base's picture for the same prompt and noise, but for its look."""
    copying: Number
    """0: as near to one training image as pictures that copy nothing; above 1: nearer than 99 % of these."""
    pictures: Count
    of: Text
    """A hash of all that was drawn and compared with. Scores that differ in it cannot be compared."""
    best: Count = 0
    """The step with the best scores so far, by the rule of a wall; 0: none but that of the untouched base."""


@dataclass(frozen=True)
class Checkpointed(Event):
    """A checkpoint is on disk."""

    type: ClassVar[str] = "checkpoint"
    step: Count
    folder: Text


@dataclass(frozen=True)
class Warned(Event):
    """Something a person should know, which does not stop the run."""

    type: ClassVar[str] = "warning"
    message: Text


@dataclass(frozen=True)
class Failed(Event):
    """The run could not go on."""

    type: ClassVar[str] = "error"
    message: Text
    step: Count = 0
    fix: Text = ""
    """What a person can do about it."""
    overrides: list[Text] = field(default_factory=list)
    """Settings with which the same run can go on, as `--set` takes them."""
    anew: list[Text] = field(default_factory=list)
    """Settings for a new run, where this one cannot be mended."""
    resume_from: Count | None = None
    """The step of the checkpoint to go on from, where the newest is damaged."""


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop, and saved."""

    type: ClassVar[str] = "stopped"
    step: Count


@dataclass(frozen=True)
class Done(Event):
    """The run reached its budget, or had a reason to end before, and its export was verified."""

    type: ClassVar[str] = "done"
    step: Count
    exports: list[Text]
    why: Text = ""
    """Why it ended before its budget was spent."""


_TYPES: dict[str, type[Event]] = {
    kind.type: kind
    for kind in (
        *(Phase, PlanMade, AttentionChosen, Step, Sampled, Validated, Scored, Checkpointed),
        *(Warned, Failed, Stopped, Done),
    )
}


class EventLog:
    """Appends events to a file; each line is whole, and on the disk before anything that follows it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.may_be_torn = True  # by a process that died, or by a full disk

    def append(self, event: Event) -> None:
        record = {"time": round(time.time(), 3), "type": event.type, **asdict(event)}
        # escaped, so that a line holds no other line break and no half letter of a file name
        line = json.dumps(_finite(record), ensure_ascii=True, allow_nan=False) + "\n"
        is_new = self.may_be_torn and not self.path.exists()
        # to append to, and never written whole: nothing of a log is ever changed
        with self.path.open("a+b") as file:
            if self.may_be_torn:
                _end_torn_line(file)
            self.may_be_torn = True
            file.write(line.encode("ascii"))
            if not isinstance(event, Step | Phase):  # these come many times a second, and can be had again
                file.flush()
                os.fsync(file.fileno())
        if is_new:
            flush_folder(self.path.parent)
        self.may_be_torn = False

    def size(self) -> int:
        """Bytes; it only grows, so it tells what was written after a moment, whatever becomes of the clock."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


@dataclass(frozen=True)
class Record:
    """An event with the moment it was written, in seconds since 1970."""

    time: float
    event: Event


def read_record(line: str) -> Record | None:
    """The record of a line; None if the line is torn, is not what a log holds, or is of a type of a later version.

    Fields of later versions are passed over.
    """
    try:
        values = json.loads(line)
        return Record(_TIME.validate_python(values["time"]), _READERS[values["type"]].validate_python(values))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


_TIME = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
_READERS: dict[str, TypeAdapter[Event]] = {name: TypeAdapter(kind) for name, kind in _TYPES.items()}


def read_events(path: Path) -> Iterator[Record]:
    """All records of a log, as they were written; what stands of them in the end is told by a `Story`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    yield from filter(None, map(read_record, text.split("\n")))


def _finite(value: Any) -> Any:
    """JSON has no word for infinity and for what is no number; `null` stands for both."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(log: IO[bytes]) -> None:
    """If the last line has no end, end it, so that the next record stands on its own."""
    if log.seek(0, os.SEEK_END):
        log.seek(-1, os.SEEK_END)
        if log.read(1) != b"\n":
            log.write(b"\n")

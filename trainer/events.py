"""`events.jsonl`: what happened in a run, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Something that happened; `type` is its name in the file."""

    type: ClassVar[str]


@dataclass(frozen=True)
class Phase(Event):
    """The run does something that takes time; `total` is 0 where it cannot be counted."""

    type: ClassVar[str] = "phase"
    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class PlanMade(Event):
    """What will be done: the plan's facts, and what is trained."""

    type: ClassVar[str] = "plan"
    steps: int
    images: int
    plan: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. `images` counts from the start of the run."""

    type: ClassVar[str] = "step"
    step: int
    images: int
    loss: float
    grad_norm: float
    lr: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Sampled(Event):
    """Previews were drawn."""

    type: ClassVar[str] = "sample"
    step: int
    folder: str
    prompts: list[str]


@dataclass(frozen=True)
class Checkpointed(Event):
    """A checkpoint is on disk."""

    type: ClassVar[str] = "checkpoint"
    step: int
    folder: str


@dataclass(frozen=True)
class Warned(Event):
    """Something a person should know, which does not stop the run."""

    type: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True)
class Failed(Event):
    """The run could not go on."""

    type: ClassVar[str] = "error"
    message: str
    step: int = 0


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop, and saved."""

    type: ClassVar[str] = "stopped"
    step: int


@dataclass(frozen=True)
class Done(Event):
    """The run reached its budget, and its export was verified."""

    type: ClassVar[str] = "done"
    step: int
    exports: list[str]


_TYPES: dict[str, type[Event]] = {
    kind.type: kind for kind in (Phase, PlanMade, Step, Sampled, Checkpointed, Warned, Failed, Stopped, Done)
}


class EventLog:
    """Appends events to a file; each line is whole, and on the disk before anything that follows it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _end_torn_line(path)

    def append(self, event: Event) -> None:
        record = {"time": round(time.time(), 3), "type": event.type, **asdict(event)}
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            # escaped, so that a line holds no other line break and no half letter of a file name
            file.write(json.dumps(_finite(record), ensure_ascii=True, allow_nan=False) + "\n")
            if not isinstance(event, Step | Phase):  # these come many times a second, and can be had again
                file.flush()
                os.fsync(file.fileno())


@dataclass(frozen=True)
class Record:
    """An event with the moment it was written, in seconds since 1970."""

    time: float
    event: Event


def read_events(path: Path) -> Iterator[Record]:
    """All records of a log; a torn last line and types of later versions are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):
        try:
            values = json.loads(line)
            yield Record(values["time"], _event(values))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue


def history(path: Path) -> list[Record]:
    """The records of a run as it stands: of what a kill undid and a resume did again, the last that was done.

    A step that comes again takes the place of every step, preview and checkpoint from it on; a preview or checkpoint
    that comes again, that of the earlier one.
    """
    records: list[Record] = []
    newest, drawn_or_saved = -1, set()
    for record in read_events(path):
        event = record.event
        kind = (type(event), _step_of(event))
        if isinstance(event, Step):
            if event.step <= newest:
                records = [before for before in records if _step_of(before.event) < event.step]
            newest = event.step
        elif isinstance(event, Sampled | Checkpointed):
            if kind in drawn_or_saved:
                records = [before for before in records if (type(before.event), _step_of(before.event)) != kind]
            drawn_or_saved.add(kind)
        records.append(record)
    return records


def _step_of(event: Event) -> int:
    """The step that an event belongs to; -1 if it belongs to the whole run."""
    return event.step if isinstance(event, Step | Sampled | Checkpointed) else -1


def _event(values: dict[str, Any]) -> Event:
    """The event of a line; fields of later versions are passed over."""
    kind = _TYPES[values["type"]]
    known = {f.name: f.type for f in fields(kind) if f.name in values}
    return kind(**{name: _number(values[name]) if type_ == "float" else values[name] for name, type_ in known.items()})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """JSON has no word for infinity and for what is no number; `null` stands for both."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(path: Path) -> None:
    """If a process died in the middle of a line, end that line, so that the next record stands on its own."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")

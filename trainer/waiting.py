"""Which runs of a folder wait to be trained, on disk, so that it outlives every process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import RunError
from .files import locked, patiently, write_text
from .owner import ProcessId


@dataclass(frozen=True)
class Entry:
    """A run that waits, with how it is to be resumed."""

    name: str
    overrides: tuple[str, ...] = ()
    """Settings that are laid over its own, as `--set` takes them."""
    from_step: int | None = None
    """The checkpoint to go on from; None is the newest."""


@dataclass(frozen=True)
class Current:
    """The run whose turn it is, and the process that was started for it."""

    entry: Entry
    log_size: int
    """How many bytes the run's log had then: what was written after them, this process has written."""
    process: ProcessId


@dataclass
class WaitingList:
    """Who waits, first come first, and whose turn it is."""

    entries: list[Entry] = field(default_factory=list)
    current: Current | None = None

    def has(self, name: str) -> bool:
        return any(entry.name == name for entry in self.entries)

    def drop(self, name: str) -> None:
        self.entries = [entry for entry in self.entries if entry.name != name]


def read_waiting(runs: Path) -> WaitingList:
    """The list of a folder of runs; empty if there is none, or it cannot be understood.

    Raises:
        RunError: if the file is there and cannot be opened, so that nobody writes an empty list in its place.
    """
    file = _file(runs)
    try:
        text = patiently(lambda: file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return WaitingList()
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror})", str(file), "Change its permissions.") from error
    try:
        values = json.loads(text)
        current = values["current"]
        return WaitingList([_entry(one) for one in values["waiting"]], _current(current) if current else None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return WaitingList()


@contextmanager
def changed_waiting(runs: Path) -> Iterator[WaitingList]:
    """The list, which is written when the block succeeds; meanwhile no other process changes it."""
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / ".queue.lock"):
        waiting = read_waiting(runs)
        before = json.dumps(_values(waiting))
        yield waiting
        if (after := json.dumps(_values(waiting))) != before:
            write_text(_file(runs), after + "\n")


def _file(runs: Path) -> Path:
    return runs / ".queue.json"


def _values(waiting: WaitingList) -> dict[str, Any]:
    current = waiting.current
    return {"waiting": [asdict(entry) for entry in waiting.entries], "current": asdict(current) if current else None}


def _entry(values: dict[str, Any]) -> Entry:
    return Entry(values["name"], tuple(values["overrides"]), values["from_step"])


def _current(values: dict[str, Any]) -> Current:
    size = values.get("log_size", 0)  # earlier versions held the time of day in its place
    return Current(_entry(values["entry"]), int(size), ProcessId.read(values["process"]))

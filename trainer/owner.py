"""Which process has something to itself: a run that it trains, a queue that it works through."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from .files import locked, patiently, remove, write_text
from .jsonfile import read_json


@dataclass(frozen=True)
class ProcessId:
    """A process of this computer. Numbers are given again, so the moment at which it began belongs to it."""

    pid: int
    created: float
    """Seconds since 1970, as the clock was set then."""
    boot: str = ""
    """Linux: which start of the system the process belongs to."""
    ticks: int = 0
    """Linux: how long after that start it began, which does not depend on how the clock is set. Other systems, and what
    earlier versions wrote, have `created` alone."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Raises psutil.Error if there is no such process any more."""
        return cls(pid, psutil.Process(pid).create_time(), *_began(pid))

    @classmethod
    def of_started(cls, pid: int) -> ProcessId:
        """Of a process that was started just now, and may have ended already; it is then a dead one's."""
        try:
            return cls.of(pid)
        except psutil.Error:
            return cls(pid, 0.0)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> ProcessId:
        """From what `asdict` gave, which may hold more.

        Raises:
            KeyError, TypeError, AttributeError: if it names no process.
        """
        named = cls(values["pid"], values["created"], values.get("boot", ""), values.get("ticks", 0))
        if not (isinstance(named.pid, int) and isinstance(named.created, int | float)):
            raise TypeError("names no process")
        return named

    def alive(self) -> bool:
        """Whether it still runs. A killed process whose parent has not taken note of it yet, a zombie, does not."""
        try:
            return self.is_same(ProcessId.of(self.pid)) and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except (ValueError, OverflowError, psutil.Error):
            return False

    def is_same(self, other: ProcessId) -> bool:
        if self.boot:
            return (self.pid, self.boot, self.ticks) == (other.pid, other.boot, other.ticks)
        return self.pid == other.pid and abs(self.created - other.created) < 2


def read_process(file: Path) -> ProcessId | None:
    """The process that a file names; None if it names none."""
    try:
        return ProcessId.read(patiently(lambda: read_json(file)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_process(file: Path, process: ProcessId) -> None:
    write_text(file, json.dumps(asdict(process)) + "\n")


def _began(pid: int) -> tuple[str, int]:
    """The start of the system, and the ticks from then until a process began; nothing where Linux does not tell."""
    try:
        after_its_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return _boot(), int(after_its_name[_STARTTIME])
    except (OSError, LookupError, ValueError):
        return "", 0


_STARTTIME = 22 - 3
"""The field of `/proc/PID/stat`, counted from the third, which follows the name (proc(5))."""


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@cache
def _this(pid: int) -> ProcessId:
    return ProcessId.of(pid)


@dataclass(frozen=True)
class Owner:
    """Says in a file which process owns what lies beside it; a dead process owns nothing.

    On a drive that several computers share, none sees whether a process of another one lives, and may take over what is
    that one's. So whoever owns something for long asks again and again whether it can `hold` it.
    """

    file: Path

    def alive(self) -> bool:
        """Whether the process that the file names still runs on this computer."""
        named = read_process(self.file)
        return named is not None and named.alive()

    def is_mine(self) -> bool:
        """Whether the file names this process."""
        named = read_process(self.file)
        return named is not None and named.is_same(_this(os.getpid()))

    def take(self) -> bool:
        """Own it from now on; of several that try at once, one does. False if another living process owns it."""
        with self._alone():
            if self.alive():
                return False
            write_process(self.file, _this(os.getpid()))
            return True

    def hold(self) -> bool:
        """Go on owning it, also if the file was removed; False if another process owns it now."""
        return self.is_mine() or (read_process(self.file) is None and self.take())

    def give_up(self) -> None:
        """Own it no more. What another process owns meanwhile stays its own."""
        with suppress(OSError), self._alone():  # what stays on a disk that takes nothing any more names a dead process
            if self.is_mine():
                remove(self.file)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with locked(self.file.with_name(f".{self.file.stem.lstrip('.')}.lock")):
            yield

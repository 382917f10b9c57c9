"""One try: a folder of its own, with pictures, a cache and a run, and the processes that work on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.trainer.events import Event, Step, read_events
from lorasmith.trainer.jobs import RunFolder

from .processes import Injection, Process, forked, fresh

NAME = "tried"


@dataclass(frozen=True)
class Trial:
    """The folder of a try, and what is in it."""

    folder: Path

    @property
    def file(self) -> Path:
        """The configuration."""
        return self.folder / "run.toml"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def disk(self) -> Path:
        """What may be put on a small disk."""
        return self.folder / "disk"

    @property
    def runs(self) -> Path:
        return self.disk / "runs"

    @property
    def cache(self) -> Path:
        return self.disk / "cache"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.runs / NAME)

    @property
    def said(self) -> Path:
        """What all its processes have printed."""
        return self.folder / "said.txt"

    @property
    def _counter(self) -> Path:
        return self.folder / "steps"

    def copied(self, folder: Path) -> Trial:
        """The same elsewhere; its configurations are told where it lies now."""
        shutil.copytree(self.folder, folder)
        copy = Trial(folder)
        for file in filter(Path.exists, (copy.file, copy.run.config)):
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(str(self.folder), str(folder)), encoding="utf-8")
        return copy

    def start(self, *arguments: str | Path, inject: Injection | None = None, said: Path | None = None) -> Process:
        """Start a `lorasmith` command on it."""
        return forked([str(one) for one in arguments], self.folder, said or self.said, inject, self._counter)

    def start_fresh(self, *arguments: str | Path) -> Process:
        """Likewise with an interpreter of its own; its steps are not counted."""
        return fresh([str(one) for one in arguments], self.folder, self.said)

    def go_on(self, further: Sequence[str] = ()) -> Process:
        """What a person does when all is well again: resume; or begin, if nothing was begun."""
        if self.run.config.exists():
            return self.start("resume", self.run.path, *further)
        return self.start("train", self.file)

    def words(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""

    def events(self) -> list[Event]:
        return [record.event for record in read_events(self.run.events)]

    def steps(self) -> list[int]:
        return [event.step for event in self.events() if isinstance(event, Step)]

    def taken(self) -> int:
        """How many steps its processes have taken, by the optimizer's own account."""
        return self._counter.stat().st_size if self._counter.exists() else 0

    def told(self, of: Callable[[list[Event]], bool]) -> Callable[[], bool]:
        """Whether the log tells of something; it is read again only when it has grown."""
        size, found = -1, False

        def look() -> bool:
            nonlocal size, found
            now = self.run.events.stat().st_size if self.run.events.exists() else 0
            if now != size:
                size, found = now, of(self.events())
            return found

        return look

"""A `lorasmith` command that a page has started, in a process of its own, which outlives the page.

How it stands is told by its folder, so that every page sees the same, after a reload and after a restart too. What the
command answers, on its stdout, is the only proof that it succeeded.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...trainer.errors import RunError
from ...trainer.files import locked, write_text
from ...trainer.jobs import detached
from ...trainer.jsonfile import read_json
from ...trainer.owner import Owner, ProcessId

_LAST_LINES = 12


@dataclass(frozen=True)
class Stand:
    """How an errand stands."""

    state: Literal["none", "running", "ended"]
    started: float = 0.0
    """Seconds since 1970."""
    ended: float = 0.0
    answer: str = ""
    """What it has answered once it ended; empty if it failed."""
    complaint: str = ""
    """What it said besides: of one that failed, why."""


@dataclass(frozen=True)
class Errand:
    """One command at a time, and the last one that was started."""

    folder: Path
    what: str
    """As in "an export"."""

    def start(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it; `environment` is laid over that of this process, and is written nowhere.

        Raises:
            RunError: if the last one has not ended.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            if self.is_running():
                what = f"{self.what} is under way, and a second one would write the same files"
                raise RunError(what, str(self.folder.parent), "Wait until it has ended.")
            self._process.unlink(missing_ok=True)
            with self._answer.open("wb") as said, self._complaint.open("wb") as told:
                process = detached(arguments, said, told, environment)
            known = asdict(ProcessId.of_started(process.pid)) | {"started": time.time()}
            write_text(self._process, json.dumps(known) + "\n")

    def is_running(self) -> bool:
        return Owner(self._process).alive()

    def stand(self) -> Stand:
        """How it stands now."""
        known = self._known()
        if not known:
            return Stand("none")
        if self.is_running():
            return Stand("running", known["started"])
        said = [file.stat().st_mtime for file in (self._answer, self._complaint) if file.is_file()]
        ended = max([known["started"], *said])  # the clock may have been set back meanwhile
        return Stand("ended", known["started"], ended, _text(self._answer), _text(self._complaint))

    def wait(self) -> Stand:
        """How it stands once it has ended."""
        while (stand := self.stand()).state == "running":
            time.sleep(0.2)
        return stand

    def _known(self) -> dict[str, Any]:
        """The process; nothing if none was ever started."""
        try:
            known = read_json(self._process)
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) and {"pid", "created", "started"} <= known.keys() else {}

    @property
    def _process(self) -> Path:
        return self.folder / "process.json"

    @property
    def _answer(self) -> Path:
        return self.folder / "answer.txt"

    @property
    def _complaint(self) -> Path:
        return self.folder / "said.log"


def why_it_failed(stand: Stand) -> str:
    """What a command said before it ended without an answer: its error, or else its last lines."""
    if found := re.search(r"^error: (.+)", stand.complaint, re.MULTILINE | re.DOTALL):
        return found[1].strip()
    lines = stand.complaint.strip().splitlines()[-_LAST_LINES:]
    return "\n".join(["The process ended before its time, and named no reason.", *lines])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""

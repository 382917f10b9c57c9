"""The dataset doctor at work behind the page: a folder is examined in a thread, once for each state it is in.

Pixels are decoded and measured once for each image; after a caption was changed, only words are looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

from ...datasets.checks import Examination, examine
from ...datasets.listing import Memory, state_of
from ...trainer.errors import LorasmithError, UserError, first_line

_KEPT = 8
"""Examinations, so that several tabs can look at several folders."""


@dataclass(frozen=True)
class Question:
    """What is to be examined, and for what."""

    folder: Path
    trigger: str
    resolution: int


@dataclass(frozen=True)
class Checkup:
    """How far an examination is."""

    state: str
    """Of the folder that `examination` is about."""
    examination: Examination | None
    """The newest there is; of an earlier state as long as `doing` is not empty."""
    doing: str = ""
    """As in `measuring 12 of 24 images`."""
    error: LorasmithError | None = None


class Checkups:
    """Examines what it is asked about; several pages may ask at once."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._turn, self._lock = Lock(), Lock()
        self._known: dict[Question, Checkup] = {}
        self._under_way: dict[Question, Thread] = {}
        self._doing: dict[Question, str] = {}

    def of(self, question: Question) -> Checkup:
        """What is known by now; what is not is found out meanwhile."""
        state = state_of(question.folder)
        with self._lock:
            known = self._known.get(question)
            if known and known.state == state:
                return known
            examination = known.examination if known else None
            working = self._under_way.get(question)
            if working and not working.is_alive():
                what, fix = "the examination broke off", "What happened stands in the terminal that the app runs in."
                return Checkup(state, examination, error=LorasmithError(what, str(question.folder), fix))
            if working is None:
                self._doing[question] = "looking at the images"
                thread = Thread(target=self._examine, args=(question, state), daemon=True)
                self._under_way[question] = thread
                thread.start()
            return Checkup(known.state if known else "", examination, self._doing[question])

    def _examine(self, question: Question, state: str) -> None:
        def progress(what: str, done: int, total: int) -> None:
            self._doing[question] = f"{what} image {min(done + 1, total)} of {total}"

        folder, resolution, trigger = question.folder, question.resolution, question.trigger
        try:
            with self._turn:  # one after the other: they share their memory
                found = examine(folder, resolution, trigger, progress=progress, mapper=self._memory.map)
            checkup = Checkup(state, found)
        except LorasmithError as error:
            checkup = Checkup(state, None, error=error)
        except (OSError, ValueError, LookupError) as error:  # of a folder that changes while it is looked at
            place = str(getattr(error, "filename", None) or question.folder)
            why = getattr(error, "strerror", None) or first_line(error)
            fix = "Check its path and permissions."
            checkup = Checkup(state, None, error=UserError(f"cannot be read ({why})", place, fix))
        with self._lock:
            self._known.pop(question, None)
            self._known[question] = checkup
            for old in list(self._known)[:-_KEPT]:
                del self._known[old]
            self._under_way.pop(question, None)

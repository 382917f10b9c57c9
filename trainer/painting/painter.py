"""The painter: a process that draws what is ordered, picture by picture, and keeps the base in memory between orders.

It starts without torch, which comes with the first order that is not drawn already.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from ..choosing.choice import choice_file, read_choice, write_choice
from ..errors import LorasmithError, UserError
from ..jobs import find_runs
from .easel import IDLE, Drawn, Easel, State, Ticket
from .orders import Order, WallOrder, files_of

if TYPE_CHECKING:
    from ..choosing.judge import Case
    from .studio import Studio

_BETWEEN_LOOKS = 0.2  # seconds
_BETWEEN_LOOKS_AT_RUNS = 2.0


def paint(runs: Path, idle: float = IDLE) -> None:
    """Draw what is ordered for a folder of runs, until nothing was for `idle` seconds.

    Raises:
        UserError: if another process draws for the folder.
    """
    Painter(Easel(runs), idle).work()


class Painter:
    """Carries out the orders of an easel, the oldest first.

    Where drawing takes the memory that training needs, on a GPU, it makes room as soon as a run of the folder is
    trained: orders then fail with that reason.
    """

    def __init__(self, easel: Easel, idle: float = IDLE, needs_gpu: Callable[[], bool] | None = None) -> None:
        self.easel = easel
        self.idle = idle
        self._needs_gpu = needs_gpu or _has_gpu
        self._studio: Studio | None = None

    def work(self) -> None:
        """
        Raises:
            UserError: if another process draws for the folder.
        """
        self.easel.take_up()
        worked = looked = time.monotonic()
        while True:
            now = time.monotonic()
            if ticket := self.easel.next():
                self.carry_out(ticket)
                worked = time.monotonic()
            elif now - worked >= self.idle and self.easel.leave():
                return
            elif now - looked >= _BETWEEN_LOOKS_AT_RUNS:
                looked = now
                if self._studio and self._what_trains() and self.easel.leave():
                    return
            else:
                time.sleep(_BETWEEN_LOOKS)

    def carry_out(self, ticket: Ticket) -> None:
        """Whatever goes wrong ends this order alone."""
        progress = _Progress(ticket)
        try:
            self._draw(ticket, progress)
            progress.tell("done")
        except _CancelledError:
            progress.tell("cancelled")
        except Exception as error:
            self._note(error)
            progress.fail(error)

    def _draw(self, ticket: Ticket, progress: _Progress) -> None:
        order = ticket.order()
        files = files_of(order, self.easel.runs)
        progress.begin(files.values())
        case = self._case(order, progress) if _wants_scores(order) else None
        progress.begin({*files.values(), *(case.files() if case else ())})
        if case is None and progress.drawn.done == progress.drawn.total:
            return
        if self._studio is None:
            from .studio import Studio

            self._studio = Studio()
        self._make_room()
        self._studio.prepare(order)
        progress.tell("drawing")
        self._studio.draw(order, files, lambda: self._one_more(progress), progress.refuse_cancelled)
        if case:
            self._score(case, self._studio, progress)

    def _case(self, order: WallOrder, progress: _Progress) -> Case | None:
        """The wall and what it is compared with; None if that is not to be had."""
        from ..choosing.judge import Case

        with self._wall_stays(progress):
            return Case.of(order.judged())
        return None

    def _score(self, case: Case, studio: Studio, progress: _Progress) -> None:
        """Draw what the wall is compared with, and write down what the scores say."""

        def looked(done: int, total: int) -> None:
            progress.refuse_cancelled()
            progress.score(done / total)
            self._make_room()

        with self._wall_stays(progress):
            case.draw(studio, lambda: self._one_more(progress), progress.refuse_cancelled)
            progress.score(0)
            write_choice(case.choice(studio, looked, after_step=progress.refuse_cancelled), choice_file(case.order))

    @contextmanager
    def _wall_stays(self, progress: _Progress) -> Iterator[None]:
        """Whatever goes wrong with scores is told, and spoils no pictures."""
        try:
            yield
        except _CancelledError:
            raise
        except Exception as error:
            self._note(error)
            progress.leave_unscored(error)

    def _one_more(self, progress: _Progress) -> None:
        progress.one_more()
        self._make_room()

    def _note(self, error: Exception) -> None:
        """Write an error to the log; one that was not foreseen may have left anything in memory."""
        traceback.print_exc()
        sys.stderr.flush()
        if self._studio and not isinstance(error, LorasmithError):
            self._studio.clear()

    def _make_room(self) -> None:
        if name := self._what_trains():
            assert self._studio is not None
            self._studio.clear()
            what = f"{name} is being trained, and needs the memory of the GPU"
            raise UserError(what, "", "Draw when it has ended, or stop it first; what is drawn already is kept.")

    def _what_trains(self) -> str:
        """The name of a run whose training needs the memory that drawing takes; empty if there is none."""
        if not self._needs_gpu():
            return ""
        return next((run.name for run in find_runs(self.easel.runs) if run.owner_alive()), "")


def _wants_scores(order: Order) -> TypeGuard[WallOrder]:
    return isinstance(order, WallOrder) and order.scored_with is not None and read_choice(order.judged()) is None


class _CancelledError(Exception):
    """Nobody wants the order any more."""


@dataclass
class _Progress:
    """How far an order is, as its ticket tells it."""

    ticket: Ticket
    drawn: Drawn = field(default_factory=lambda: Drawn("loading"))
    _since: float = 0.0
    _own: int = 0
    """Pictures that were drawn since then."""

    def begin(self, files: Iterable[Path]) -> None:
        """Say how many pictures there will be, and how many of them are there."""
        there = [file.is_file() for file in files]
        self.drawn = replace(self.drawn, done=sum(there), total=len(there))
        self.tell("loading")

    def one_more(self) -> None:
        self._own += 1
        done, total = self.drawn.done + 1, self.drawn.total
        each = (time.monotonic() - self._since) / self._own
        self.drawn = replace(self.drawn, done=done, seconds_left=round(each * (total - done), 1))
        self.tell("drawing")

    def refuse_cancelled(self) -> None:
        if self.ticket.cancel_file.exists():
            raise _CancelledError

    def score(self, share: float) -> None:
        self.drawn = replace(self.drawn, scored=round(share, 3))
        self.tell("scoring")

    def leave_unscored(self, error: Exception) -> None:
        """Say why there are no scores; what is drawn is all that will be."""
        message, fix = _told(error)
        self.drawn = replace(self.drawn, total=self.drawn.done, unscored=message, unscored_fix=fix)
        self.tell(self.drawn.state)

    def fail(self, error: Exception) -> None:
        message, fix = _told(error)
        self.drawn = replace(self.drawn, message=message, fix=fix)
        self.tell("failed")

    def tell(self, state: State) -> None:
        if state == "drawing" and not self._since:
            self._since = time.monotonic()
        left = self.drawn.seconds_left if state == "drawing" else None
        self.drawn = replace(self.drawn, state=state, seconds_left=left)
        self.ticket.tell(self.drawn)


def _told(error: Exception) -> tuple[str, str]:
    """What happened, and what a person can do about it."""
    if isinstance(error, LorasmithError):
        problems = error.problems
        what = "; ".join(f"{problem.where}: {problem.what}" if problem.where else problem.what for problem in problems)
        return what, " ".join(dict.fromkeys(problem.fix for problem in problems if problem.fix))
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full", "Take a smaller size, or end what else uses the GPU, and order again."
    return f"{type(error).__name__}: {error}", "Order the pictures again; the log of the painter tells more."


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

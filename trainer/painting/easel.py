"""Where orders wait, and what became of each: files in `<runs>/.painter/`, so that any number of pages agree.

An order is `<id>.order.json`; ids rise, so the oldest comes first. What became of it is in `<id>.state.json`, which the
painter writes after every picture, and `<id>.cancel` says that nobody wants it any more. The painter is a process of
its own (`lorasmith paint RUNS`), started when it is needed; it ends when it is not.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from ..errors import UserError
from ..files import locked, remove, remove_leftovers, write_text
from ..jobs import start_detached
from ..jsonfile import read_json
from ..owner import Owner, ProcessId, write_process
from .orders import Order, files_of, read_order, write_order

IDLE = 300.0
"""Seconds without an order after which the painter ends."""
_KEPT = 24 * 3600.0
"""Seconds after which what became of an order is forgotten; its pictures stay."""

State = Literal["waiting", "loading", "drawing", "scoring", "done", "failed", "cancelled"]
_ENDED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Drawn:
    """What became of an order so far."""

    state: State
    done: int = 0
    """Pictures that are there, those among them that were there before."""
    total: int = 0
    message: str = ""
    """Why it failed."""
    fix: str = ""
    seconds_left: float | None = None
    """None until one picture has shown how long they take."""
    scored: float = 0.0
    """How much of the scoring is done, 0 to 1."""
    unscored: str = ""
    """Why there are no scores, though they were wanted; the pictures are there all the same."""
    unscored_fix: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED


_DRAWN = TypeAdapter(Drawn)


@dataclass(frozen=True)
class Ticket:
    """An order that was placed."""

    easel: Easel
    id: str

    @property
    def order_file(self) -> Path:
        return self.easel.folder / f"{self.id}.order.json"

    @property
    def state_file(self) -> Path:
        return self.easel.folder / f"{self.id}.state.json"

    @property
    def cancel_file(self) -> Path:
        return self.easel.folder / f"{self.id}.cancel"

    def order(self) -> Order:
        """
        Raises:
            UserError: if it is forgotten, or was written by something else.
        """
        try:
            text = self.order_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError("the order is not known any more", self.id, _AGAIN) from None
        return read_order(text, self.id)

    def files(self) -> list[Path]:
        """Where its pictures are, or will be.

        Raises:
            UserError: likewise, or if a checkpoint or a LoRA file is not there any more.
        """
        return list(files_of(self.order(), self.easel.runs).values())

    def state(self) -> Drawn:
        """What became of it; what no painter works on any more has failed."""
        told = self.told()
        if told is None and not self.order_file.exists():
            return Drawn("failed", message="the order is not known any more", fix=_AGAIN)
        if told and told.has_ended:
            return told
        if self.cancel_file.exists():
            return replace(told or Drawn("cancelled"), state="cancelled", seconds_left=None)
        if self.easel.is_attended():
            return told or Drawn("waiting")
        told = self.told()  # it may have been finished just now
        return told if told and told.has_ended else self.easel.abandoned(told)

    def cancel(self) -> None:
        """Nobody wants it any more; the painter leaves off within a step. What is drawn stays."""
        if self.order_file.exists():
            self.cancel_file.touch()

    def tell(self, drawn: Drawn) -> None:
        """For the painter: what became of it."""
        write_text(self.state_file, json.dumps(asdict(drawn)) + "\n")

    def told(self) -> Drawn | None:
        """What the painter said last; None if nothing yet."""
        try:
            return _DRAWN.validate_python(read_json(self.state_file))
        except (OSError, ValueError, TypeError):
            return None


_AGAIN = "Order the pictures again."
_GONE = "the process that draws has ended"
_ID = re.compile(r"\d{20}-[0-9a-f]{8}")


class Easel:
    """Takes orders for the runs of a folder."""

    def __init__(self, runs: Path, idle: float = IDLE) -> None:
        """`idle`: seconds without an order after which a painter that is started here ends."""
        self.runs = runs.absolute()
        self.folder = self.runs / ".painter"
        self.log = self.folder / "painter.log"
        self._owner = Owner(self.folder / "painter.json")
        self._started = Owner(self.folder / "started.json")
        """Which process was started to become the owner."""
        self._idle = idle

    def place(self, order: Order) -> Ticket:
        """Have something drawn; what is drawn already is not drawn again.

        Raises:
            RunError: if a checkpoint is not there.
            UserError: if a value is out of its bounds, a LoRA file is not there, or a run lies elsewhere.
        """
        text = write_order(order)
        if order.run and Path(order.run).resolve().parent != self.runs.resolve():
            raise UserError("lies in another folder of runs", order.run, f"Name a run in {self.runs}.")
        files_of(order, self.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget()
        with locked(self.folder / ".lock"):
            newest = max(self._ids(), default="0").partition("-")[0]
            number = max(time.time_ns(), int(newest) + 1)  # the clock may have been set back
            ticket = Ticket(self, f"{number:020d}-{secrets.token_hex(4)}")
            write_text(ticket.order_file, text)
        self._attend()
        return ticket

    def ticket(self, id: str) -> Ticket:
        """
        Raises:
            UserError: if it is no id of a ticket.
        """
        if not _ID.fullmatch(id):
            raise UserError("is no ticket", id[:40], _AGAIN)
        return Ticket(self, id)

    def tickets(self) -> list[Ticket]:
        """All that are not forgotten, the newest first."""
        return [Ticket(self, id) for id in sorted(self._ids(), reverse=True)]

    def is_attended(self) -> bool:
        """Whether a painter lives, or has just been started."""
        return self._owner.alive() or self._started.alive()

    def _attend(self) -> None:
        """Start a painter, unless one lives."""
        with locked(self.folder / ".lock"):
            if not self.is_attended():
                process = start_detached(["paint", str(self.runs), "--idle", str(self._idle)], self.log)
                write_process(self._started.file, ProcessId.of_started(process.pid))

    def _ids(self) -> Iterator[str]:
        names = (file.name.removesuffix(".order.json") for file in self.folder.glob("*.order.json"))
        return (name for name in names if _ID.fullmatch(name))

    def _forget(self) -> None:
        """Remove what nobody has touched for a day."""
        for id in list(self._ids()):
            files = [file for file in self.folder.glob(f"{id}.*") if file.exists()]
            is_old = files and time.time() - max(file.stat().st_mtime for file in files) > _KEPT
            if is_old and Ticket(self, id).state().has_ended:  # else the clock was set, or a picture takes long
                for file in files:
                    file.unlink(missing_ok=True)

    # -- what the painter does ----------------------------------------------------------------------------------------

    def take_up(self) -> None:
        """Say that this process draws. What an earlier one left half done has failed, and is not begun again.

        Raises:
            UserError: if another one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._owner.take():
            raise UserError("another process draws for this folder", str(self.runs), "Let it draw, or end it first.")
        remove_leftovers(self.folder)
        for ticket in self.tickets():
            if (told := ticket.told()) and not told.has_ended:
                was_cancelled = ticket.cancel_file.exists()
                ticket.tell(replace(told, state="cancelled") if was_cancelled else self.abandoned(told))

    def next(self) -> Ticket | None:
        """The oldest order that nobody has begun; those that were cancelled meanwhile are told to be so."""
        for ticket in reversed(self.tickets()):
            if ticket.state_file.exists():
                continue
            if not ticket.cancel_file.exists():
                return ticket
            ticket.tell(Drawn("cancelled"))
        return None

    def leave(self) -> bool:
        """Say that this process draws no more; not if an order came just now."""
        with locked(self.folder / ".lock"):
            if self.next():
                return False
            remove(self._started.file)  # on Windows the process that was started has started this one
            self._owner.give_up()
            return True

    def abandoned(self, told: Drawn | None) -> Drawn:
        """What an order has come to whose painter is gone."""
        fix = f"{_AGAIN} What is drawn already is kept. What the process said is in {self.log}."
        return replace(told or Drawn("failed"), state="failed", message=_GONE, fix=fix, seconds_left=None)

"""What happened in a run so far, kept in step with its log: only what was appended is read again."""

from __future__ import annotations

import math
import os
import statistics
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, TypeVar

from .events import (
    AttentionChosen,
    Checkpointed,
    Done,
    Failed,
    Phase,
    PlanMade,
    Record,
    Sampled,
    Scored,
    Step,
    Stopped,
    Validated,
    Warned,
    read_record,
)
from .steps import Steps

Placed = TypeVar("Placed", Sampled, Validated, Scored, Checkpointed)
Measured = TypeVar("Measured", Validated, Scored)

DRAWING, SAVING, EXPORTING = "drawing previews", "saving", "exporting and verifying"
VALIDATING = "measuring the validation loss"
SCORING = "drawing and scoring pictures"
"""The phases that come between steps, and after the last one."""
_SMOOTHING = 0.95
_STEPS_OF_A_PACE = 50
_STEPS_BEFORE_AN_ESTIMATE = 20
_HEAD = 200
"""Bytes that tell a log from one that has taken its place: a log begins with the millisecond of its first event."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curves of the loss and of the learning rates."""

    step: int
    loss: float
    smoothed: float
    lr: dict[str, float]


class Story:
    """A run as it stands: of what a kill undid and a resume did again, the last that was done.

    A step that comes again takes the place of every step, preview, validation, score and checkpoint from it on; one of
    these that comes again, that of the earlier one.
    """

    def __init__(self, events: Path) -> None:
        self.path = events
        self._lock = threading.RLock()  # several views may keep one story
        self._forget()

    def _forget(self) -> None:
        self.steps = Steps()
        self.samples: list[Sampled] = []
        self.validations: list[Validated] = []
        self.scores: list[Scored] = []
        self.checkpoints: list[Checkpointed] = []
        """All in the order of their steps."""
        self.warnings: list[str] = []
        self.picture_seconds = array("d")
        """How long a preview took, in each round of them that was drawn."""
        self.prediction_seconds = array("d")
        """How long a prediction of a validation took, in each of them."""
        self.scored_seconds = array("d")
        """How long a picture took that was drawn and scored, each time but the first, when others are drawn as well."""
        self.plan: PlanMade | None = None
        self.attention: AttentionChosen | None = None
        self.phase: Phase | None = None
        """What goes on now besides steps."""
        self.ended: Done | Stopped | Failed | None = None
        """The last word; None once the run went on."""
        self.last_word: Done | Stopped | Failed | None = None
        """The last word; None once a step was taken. A resume that came to no step leaves a run where it stood."""
        self.started: float | None = None
        self.last: float | None = None
        """When the first and the last record were written, in seconds since 1970."""
        self._read: tuple[int, int] | None = None  # the size of the log that was read, and when it was changed
        self._offset, self._head = 0, b""
        self._steps_since_start = 0
        self._phase_began = 0.0
        self._took: dict[str, float] = {}  # seconds that each phase took when it came last

    # -- reading ------------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read what was appended; a log that shrank or was replaced is read anew. True if anything is new."""
        with self._lock:
            return self._refresh()

    def _refresh(self) -> bool:
        try:
            stat = self.path.stat()
            found = (stat.st_size, stat.st_mtime_ns)
            if found == self._read:
                return False
            any_new = False
            with self.path.open("rb") as file:
                for line in self._new_lines(file):
                    any_new = True
                    if record := read_record(line.decode("utf-8", errors="replace")):
                        self._take(record)
        except FileNotFoundError:
            was_there = self._read is not None
            self._forget()
            return was_there
        self._read = found
        return any_new

    def _new_lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The lines that were completed since, one at a time; a torn one is read when it has its end."""
        head = file.read(_HEAD)
        if not head.startswith(self._head) or file.seek(0, os.SEEK_END) < self._offset:
            self._forget()
        self._head = head
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            yield line

    def _take(self, record: Record) -> None:
        self.started = record.time if self.started is None else self.started
        self.last = record.time
        match event := record.event:
            case Step():
                self._take_step(event, record.time)
            case Sampled():
                if self.phase and self.phase.name == DRAWING and event.prompts:
                    self.picture_seconds.append(max(0.0, record.time - self._phase_began) / len(event.prompts))
                _put(event, self.samples)
                self._end_phase(record.time)
            case Validated():
                if self.phase and self.phase.name == VALIDATING and event.predictions:
                    self.prediction_seconds.append(max(0.0, record.time - self._phase_began) / event.predictions)
                _put(event, self.validations)
                self._end_phase(record.time)
            case Scored():
                if self.phase and self.phase.name == SCORING and event.pictures and self.scores:
                    self.scored_seconds.append(max(0.0, record.time - self._phase_began) / event.pictures)
                _put(event, self.scores)
                self._end_phase(record.time)
            case Checkpointed():
                _put(event, self.checkpoints)
                self._end_phase(record.time)
            case Phase():
                self._phase_began = record.time if self.phase is None else self._phase_began
                self.phase, self.ended = event, None
            case PlanMade():
                self.plan, self.phase, self.ended = event, None, None
                self._steps_since_start = 0
            case AttentionChosen():
                self.attention = event
                self._end_phase(record.time)
            case Warned(message):
                self.warnings.append(message)
            case Done() | Stopped() | Failed():
                self.phase, self.ended, self.last_word = None, event, event

    def _take_step(self, event: Step, now: float) -> None:
        if self.steps and event.step <= self.step:
            self.steps.drop_from(event.step)
            for others in (self.samples, self.validations, self.scores, self.checkpoints):
                del others[_place(event.step, others) :]
        before = event.loss if self.loss is None or math.isnan(self.loss) else self.loss
        smoothed = _SMOOTHING * before + (1 - _SMOOTHING) * event.loss
        self.steps.append(event, smoothed if math.isfinite(smoothed) else before, now)
        self._steps_since_start += 1
        self.phase = self.ended = self.last_word = None

    def _end_phase(self, now: float) -> None:
        if self.phase:
            self._took[self.phase.name] = max(0.0, now - self._phase_began)  # the clock may have been set back
        self.phase = None

    # -- what it tells ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The last step that was taken."""
        return self.steps.step[-1] if self.steps else 0

    @property
    def loss(self) -> float | None:
        """The moving average at the last step."""
        return self.steps.smoothed[-1] if self.steps else None

    @property
    def seconds_per_step(self) -> float | None:
        """Of the last steps, without what comes between them; None before the first step since the start."""
        if not self.steps or not self._steps_since_start:
            return None
        return statistics.fmean(self.steps.seconds[-min(_STEPS_OF_A_PACE, self._steps_since_start) :])

    @property
    def size(self) -> int:
        """Bytes of the log that were read."""
        return self._offset

    def ended_since(self, size: int) -> bool:
        """Whether the last word was said after the log had so many bytes; the clock may have been set meanwhile."""
        return self.ended is not None and self.size > size

    def seconds_left(self) -> float | None:
        """From the last record to the last step, with what comes between the steps; None while that cannot be
        told, as in the first steps after a start."""
        pace = self.seconds_per_step
        if self.plan is None or pace is None or self._steps_since_start < _STEPS_BEFORE_AN_ESTIMATE:
            return None
        drawn = self.samples[-1].step if self.samples else -1
        saved = self.checkpoints[-1].step if self.checkpoints else -1
        measured = self.validations[-1].step if self.validations else -1
        scored = self.scores[-1].step if self.scores else -1
        every = self.plan.every
        to_come = {
            DRAWING: self._times_to_come(every["sample"], drawn) if every.get("sample") else 0,
            VALIDATING: self._times_to_come(every["validation"], measured) if every.get("validation") else 0,
            SCORING: self._times_to_come(every["scores"], scored) if every.get("scores") else 0,
            SAVING: self._times_to_come(every.get("save", 0), saved),
        }
        between = sum(times * self._took.get(phase, 0.0) for phase, times in to_come.items())
        return (self.plan.steps - self.step) * pace + between

    def _times_to_come(self, every: int, newest: int) -> int:
        """How often something is still done that is done each `every` steps (0: never) and at the last step."""
        assert self.plan is not None
        last, first = self.plan.steps, max(self.step, newest + 1)
        before_the_last = max(0, (last - 1) // every - (first - 1) // every) if every else 0
        return before_the_last + (last >= first)

    def curve(self, points: int = 500) -> list[CurvePoint]:
        """The curves by step; of a long run so many points of them, spread evenly, with the first and the last."""
        with self._lock:
            steps, last = self.steps, len(self.steps) - 1
            shown = range(last + 1) if last < points else [round(i * last / (points - 1)) for i in range(points)]
            return [CurvePoint(steps.step[i], steps.loss[i], steps.smoothed[i], steps.rates(i)) for i in shown]


def comparable(measured: Sequence[Measured]) -> list[Measured]:
    """Those that measured the same as the newest."""
    return [one for one in measured if one.of == measured[-1].of]


def _place(step: int, others: Sequence[Sampled | Validated | Scored | Checkpointed]) -> int:
    """Where a step stands, or would stand."""
    return bisect_left(others, step, key=attrgetter("step"))


def _put(event: Placed, others: list[Placed]) -> None:
    """In the order of steps; what comes again takes the place of the earlier one."""
    place = _place(event.step, others)
    comes_again = place < len(others) and others[place].step == event.step
    others[place : place + comes_again] = [event]

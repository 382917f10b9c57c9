"""The steps of a run in columns of numbers: a run of two days takes hundreds of thousands."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import overload

from .events import Step


class Steps(Sequence[Step]):
    """Steps in rising order; each takes some tens of bytes, as an object it would take a kilobyte.

    One thread adds and takes away, others may read meanwhile: a step is counted when all of it is there.
    """

    def __init__(self) -> None:
        self.images, self.step = array("q"), array("q")
        self.loss, self.grad_norm, self.seconds, self.memory_mib = (array("d") for _ in range(4))
        self.smoothed = array("d")
        """The moving average of the loss."""
        self.times = array("d")
        """When each was written, in seconds since 1970."""
        self.lr: dict[str, array[float]] = {}
        """By part; no number where a step trained another part only."""

    def append(self, step: Step, smoothed: float, time: float) -> None:
        before = len(self)
        for part in step.lr.keys() - self.lr.keys():
            self.lr[part] = array("d", [math.nan]) * before
        for part, rates in self.lr.items():
            rates.append(step.lr.get(part, math.nan))
        self.images.append(step.images)
        self.loss.append(step.loss)
        self.grad_norm.append(step.grad_norm)
        self.seconds.append(step.seconds)
        self.memory_mib.append(step.memory_mib)
        self.smoothed.append(smoothed)
        self.times.append(time)
        self.step.append(step.step)

    def drop_from(self, step: int) -> None:
        """Take away all from this step on."""
        kept = self.before(step)
        own = (self.images, self.loss, self.grad_norm, self.seconds, self.memory_mib, self.smoothed, self.times)
        for column in (self.step, *own, *self.lr.values()):
            del column[kept:]

    def before(self, step: int) -> int:
        """How many there are before this step."""
        return bisect_left(self.step, step)

    def rates(self, index: int) -> dict[str, float]:
        """The learning rate of each part at a place."""
        return {part: rates[index] for part, rates in self.lr.items() if not math.isnan(rates[index])}

    def __len__(self) -> int:
        return len(self.step)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return Step(
            self.step[index],
            self.images[index],
            self.loss[index],
            self.grad_norm[index],
            self.rates(index),
            self.seconds[index],
            self.memory_mib[index],
        )

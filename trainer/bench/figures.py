"""Figures from what clocks have shown: seconds a step, their spread, and ratios inside each round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Clock = Literal["wall", "cpu"]
T = TypeVar("T")


@dataclass(frozen=True)
class Lap:
    """Steps that were timed together, in seconds."""

    steps: int
    wall: float
    cpu: float
    """Of the process, all its threads together."""

    def a_step(self, clock: Clock) -> float:
        return getattr(self, clock) / self.steps


Laps = Sequence[Lap]
"""Those of one round."""


@dataclass(frozen=True)
class Spread:
    """Seconds a step over the laps of all rounds."""

    median: float
    least: float
    most: float


def spread(rounds: Sequence[Laps], clock: Clock) -> Spread:
    each = [lap.a_step(clock) for laps in rounds for lap in laps]
    return Spread(statistics.median(each), min(each), max(each))


def a_step(laps: Laps, clock: Clock) -> float:
    """Seconds a step over a whole round."""
    return sum(getattr(lap, clock) for lap in laps) / sum(lap.steps for lap in laps)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is as the other: its seconds a step by ours. What disturbs the computer disturbs both
    sides of a round, so that they are compared inside each round only."""

    rounds: tuple[float, ...]

    @classmethod
    def of(cls, ours: Sequence[Laps], other: Sequence[Laps], clock: Clock) -> Ratio:
        pairs = zip(ours, other, strict=True)
        return cls(tuple(a_step(theirs, clock) / a_step(mine, clock) for mine, theirs in pairs))

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def worst(self) -> float:
        return min(self.rounds)


def in_turn(sides: Sequence[T], number: int) -> list[T]:
    """The sides in the order of a round: it is reversed each time, so that neither always follows the other."""
    return list(sides) if number % 2 == 0 else list(reversed(sides))


def groups(steps: int, at_most: int) -> list[int]:
    """So many steps in groups: 25 of at most 10 are 10, 10 and 5."""
    return [min(at_most, steps - start) for start in range(0, steps, at_most)]

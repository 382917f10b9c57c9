"""A fault: what goes wrong, and how it is brought about."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from .injections import STRUCK
from .material import Material
from .processes import Injection
from .saved import Saved
from .trial import Trial


class NotHere(Exception):  # noqa: N818 (it is no failure)
    """A fault cannot be brought about on this computer; says why."""


@dataclass(frozen=True)
class Attempt:
    """One of the times that a fault is tried. Its number says where and when it strikes, the same each time."""

    number: int
    folder: Path
    material: Material
    undo: ExitStack
    """What is to be done when it is over."""

    def begin(self) -> Trial:
        """A run that is to be trained."""
        return self.material.begin(self.folder)

    def half_way(self) -> Trial:
        """A run that was killed half-way."""
        return self.material.half.copied(self.folder)

    def finished(self) -> Trial:
        """A run that is done."""
        return self.material.whole.copied(self.folder)

    def trained_with(self, injection: Injection, where: str, rounding: float = 0.0) -> Struck:
        """A run in whose process something is brought about."""
        trial = self.begin()
        ended = trial.start("train", trial.file, inject=injection).wait()
        slips = () if (trial.folder / STRUCK).exists() else ("the fault did not come about",)
        return Struck(trial, where, ended, Saved.of(trial.run), rounding=rounding, slips=slips)

    @property
    def random(self) -> random.Random:
        return random.Random(self.folder.name)


@dataclass(frozen=True)
class Struck:
    """What is known when a fault has struck, and nothing of the run's is at work any more."""

    trial: Trial
    where: str
    """What was done to what, in a few words."""
    ended: int | None = None
    """The exit code of the process that was struck; None if none was."""
    saved: Saved = field(default_factory=Saved)
    """What was complete before."""
    spoiled: tuple[str, ...] = ()
    """What the fault itself has damaged, by its beginning in the run folder: that is none of the product's losses."""
    mend: Callable[[], object] = lambda: None
    """What a person does about it: make room, put the folder back."""
    resume: tuple[str, ...] = ()
    """Further arguments of `resume`, as the product has named them."""
    like: Trial | None = None
    """The unbroken run of the same; None is that of the material."""
    rounding: float = 0.0
    """How far what was trained may be from it: 0, unless batches were divided."""
    slips: tuple[str, ...] = ()
    """What was not as it should be, beyond what every fault is examined for."""
    is_counted: bool = True
    """Whether all steps were counted."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, in different places or moments."""

    name: str
    what: str
    """What goes wrong, and where, in a sentence for the table."""
    times: int
    """How many places or moments there are; an attempt has a number below it."""
    strike: Callable[[Attempt], Struck]

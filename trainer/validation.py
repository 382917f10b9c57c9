"""The validation loss: what training minimises, measured with the same images, time-steps and noise each time.

The loss of a step is of other images and noise than that of the step before, and so says little. This one can be
compared from step to step, and, where images are held out, between what is trained and what is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..datasets.buckets import Shot
from ..datasets.dataset import Example, Showing, showing
from .config import ObjectiveSection
from .events import Validated
from .heldout import bands_of
from .memory import in_halves
from .noise import Draws, derive_seed, draw_image, together
from .patience import take_in
from .plan import style_of

if TYPE_CHECKING:
    from ..datasets.cache import LatentCache
    from .checkpoint import TrainState
    from .plan import Plan

Losses = Callable[[list[Showing], Draws], Tensor]
"""The loss of each image of a batch, (batch,)."""

_OF_VALIDATION = 2
"""Sets its seeds apart from those of the training."""


@dataclass(frozen=True)
class Question:
    """One image with one noise in one band of time-steps."""

    shown: Showing
    drawn: Draws


class Validation:
    """What a run is asked each time, in several batches of a few questions about one image."""

    def __init__(self, plan: Plan, latents: LatentCache, scaling_factor: float, total: int) -> None:
        self.plan, self.settings = plan, plan.config.validation
        self.latents, self.scaling_factor, self.total = latents, scaling_factor, total
        objective = plan.config.objective
        self.bands = bands_of(objective, total)
        self.objectives = [_within(objective, *band) for band in self.bands]
        sides = [plan.held_out, style_of(plan.examples)] if plan.held_out else [style_of(plan.examples)]
        self.shown = [_shown(side, self.settings.draws) for side in sides]
        """What is shown, by side: held-out and training images, or training images alone."""

    @classmethod
    def of(cls, plan: Plan, latents: LatentCache, scaling_factor: float, total: int) -> Validation | None:
        """That of a run; None if it has none."""
        settings = plan.config.validation
        return cls(plan, latents, scaling_factor, total) if settings.every and settings.by == "loss" else None

    def losses(self, losses: Losses, process: int, processes: int, progress: Callable[[int, int], None]) -> Tensor:
        """The losses that one of several processes measures, (sides, draws, bands), 0 where another one does. Where the
        memory is full, fewer questions are asked at a time.

        Raises:
            RuntimeError, MemoryError: if the memory does not hold a single one.
        """
        found = self.nothing()
        mine = [(side, n) for side in range(len(self.shown)) for n in range(self.settings.draws)][process::processes]
        for done, (side, number) in enumerate(mine):
            progress(done, len(mine))
            found[side, number] = torch.stack(in_halves(_ask(losses), self._questions(side, number)))
        return found

    def nothing(self) -> Tensor:
        """No losses yet, (sides, draws, bands)."""
        return torch.zeros(len(self.shown), self.settings.draws, len(self.bands))

    def take_in(self, state: TrainState, losses: Tensor) -> Validated:
        """Let a state know what was measured of it by all processes together, losses (sides, draws, bands), and tell it
        to others. The untouched base is no candidate for the lowest."""
        if state.step:
            take_in(state, losses[0].flatten().tolist(), self._identity)
        means: list[list[float]] = [[round(loss, 6) for loss in side.tolist()] for side in losses.mean(1)]
        return Validated(
            step=state.step,
            bands=[f"{first}-{last}" for first, last in self.bands],
            validation=means[0],
            train=means[1] if len(means) > 1 else [],
            held_out=len(self.plan.held_out),
            predictions=losses.numel(),
            of=self._identity,
            best=state.best_step,
        )

    def examples(self) -> list[Example]:
        """The images that are measured."""
        return [shown.example for side in self.shown for shown in side]

    def _questions(self, side: int, number: int) -> list[Question]:
        """One for each band; images of both sides that have the same number are given the same noise, as far as they
        are of one shape. The caption is never dropped."""
        shown = self.shown[side][number]
        mean, std = self.latents.read([shown])
        seeds = [derive_seed(self.settings.seed, number, band, _OF_VALIDATION) for band in range(len(self.bands))]
        each = [
            draw_image(mean, std, self.scaling_factor, objective, self.total, seed)
            for objective, seed in zip(self.objectives, seeds, strict=True)
        ]
        return [Question(shown, replace(drawn, caption=torch.ones_like(drawn.caption))) for drawn in each]

    @property
    def _identity(self) -> str:
        files = [[shown.example.item.sha256, shown.caption] for side in self.shown for shown in side]
        objective = self.plan.config.objective.model_dump()
        asked = [files, self.settings.seed, self.settings.draws, objective]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _shown(examples: Sequence[Example], count: int) -> list[Showing]:
    """So many showings of the images in turn, in an order that depends on their content, and of each its views in
    turn."""
    ordered = sorted(examples, key=lambda example: (example.item.sha256, example.name))
    turns = (divmod(number, len(ordered)) for number in range(count))
    return [showing(ordered, Shot(place, again)) for again, place in turns]


def _within(objective: ObjectiveSection, first: int, last: int) -> ObjectiveSection:
    """The objective in one band, all its time-steps alike, and without the noise that the model is not asked for."""
    changed = {"min_timestep": first, "max_timestep": last, "timesteps": "uniform", "input_perturbation": 0.0}
    return objective.model_copy(update=changed)


def _ask(losses: Losses) -> Callable[[Sequence[Question]], list[Tensor]]:
    def ask(questions: Sequence[Question]) -> list[Tensor]:
        drawn = together([question.drawn for question in questions])
        return list(losses([question.shown for question in questions], drawn).float().cpu())

    return ask

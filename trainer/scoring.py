"""The scores of a wall, taken while a run trains: pictures of the same prompts and noise each time.

Style gained, prompt kept and copying, against the base's own pictures of them and the training images. They judge what
people look at, which the validation loss does not; `docs/choosing.md` says what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from PIL import Image

from .choosing.choice import Scores
from .choosing.eye import Eye
from .choosing.features import Features, features_of
from .choosing.recommendation import best_of, copies
from .choosing.scales import Scales, some_captions
from .choosing.training import TrainingImages, some_images
from .encoder import to_tensor
from .events import Scored
from .plan import prompts_from
from .sample import Drawing

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from .checkpoint import TrainState
    from .plan import Plan

Draw = Callable[[Sequence[str], Drawing], list[Image.Image]]
"""Draws a picture of each prompt, as what is trained is used."""


@dataclass(frozen=True)
class Judged:
    """The pictures of one step."""

    scores: Scores
    pictures: range


class Scoring:
    """What a run is asked to draw each time, and what that is compared with."""

    def __init__(self, plan: Plan, vae: AutoencoderKL, drawing: Drawing) -> None:
        settings = plan.config.validation
        self.vae, self.drawing = vae, replace(drawing, seed=settings.seed)
        self.images: TrainingImages = some_images(plan.examples)
        self.prompts = prompts_of(plan)
        self._scales: tuple[Scales, Features] | None = None

    @classmethod
    def of(cls, plan: Plan, vae: AutoencoderKL, drawing: Drawing) -> Scoring | None:
        """That of a run; None if it has none."""
        settings = plan.config.validation
        return cls(plan, vae, drawing) if settings.every and settings.by == "scores" else None

    @property
    def has_begun(self) -> bool:
        return self._scales is not None

    def begin(self, draw_the_base: Draw) -> None:
        """Look at the training images and at what the untouched base draws."""
        captions = some_captions(self.images.captions)
        base, captioned = (self._look(draw_the_base(asked, self.drawing)) for asked in (self.prompts, captions))
        training = Eye(self.vae).true(self.images, self.drawing.size)
        asked = [*self.prompts, *captions]
        self._scales = Scales.fit(base, captioned, training, asked, self.images.captions), base

    @property
    def knows_style(self) -> bool:
        """Whether there is a style to gain."""
        return self._scales is not None and self._scales[0].style.is_known

    def scores(self, draw: Draw) -> Scores:
        """Those of what is drawn now, the mean over all pictures.

        Raises:
            ValueError: if it has not begun.
        """
        if self._scales is None:
            raise ValueError("the base's pictures were not looked at yet")
        scales, base = self._scales
        return Scores.mean(scales.scores(self._look(draw(self.prompts, self.drawing)), base))

    def take_in(self, state: TrainState, scores: Scores) -> Scored:
        """Let a state know the scores of its step, and tell them to others. The untouched base is no candidate."""
        if state.step:
            take_in(state, scores, len(self.prompts), self._identity)
        told = {name: round(value, 4) for name, value in scores.__dict__.items()}
        return Scored(state.step, **told, pictures=len(self.prompts), of=self._identity, best=state.best_step)

    def _look(self, pictures: Sequence[Image.Image]) -> Features:
        return features_of(self.vae, to_tensor(pictures))

    @property
    def _identity(self) -> str:
        files = [[example.item.sha256, example.caption] for example in self.images.examples]
        asked = [files, self.prompts, astuple(self.drawing)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def prompts_of(plan: Plan) -> list[str]:
    """The previews' prompts, or where there are none captions, in turn until there is one for each picture."""
    prompts = plan.config.sample.prompts or prompts_from(plan.examples)
    return list(islice(cycle(prompts), plan.config.validation.draws))


def take_in(state: TrainState, scores: Scores, pictures: int, of: str) -> None:
    """Let a state know what was scored at its step: by the rule of a wall it is the best of all so far, or once more is
    not. One that copies never is. `of` is a hash of what was drawn and compared with.

    It is compared with all, not with the best alone: what the rule takes for equal would add up from one to the next.
    """
    if state.best_of != of:
        state.best_step, state.scored, state.best_of = 0, [], of
    state.scored.append(list(astuple(scores)))
    each = [Judged(Scores(*one), range(pictures)) for one in state.scored]
    if not copies(each[-1]) and best_of(each) is each[-1]:
        state.best_step, state.not_lower = state.step, 0
    else:
        state.not_lower += 1

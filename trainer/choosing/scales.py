"""What pictures of some prompts are scored on: both scales, from the base's own pictures and the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import NULL_CAPTIONS, Scores
from .content import ContentScale
from .features import Features
from .style import StyleScale


@dataclass(frozen=True, eq=False)
class Scales:
    style: StyleScale
    content: ContentScale

    @classmethod
    def fit(
        cls, base: Features, captioned: Features, training: Features, asked: Sequence[str], captions: Sequence[str]
    ) -> Scales:
        """From the base's own pictures of the prompts and of some training captions, `asked` for in this order, and the
        training images with their captions."""
        own = torch.tensor([[caption == prompt for caption in captions] for prompt in asked])
        everything = Features.joined([base, captioned])
        return cls(StyleScale.fit(base, training), ContentScale.fit(everything, training, own))

    def scores(self, drawn: Features, base: Features) -> list[Scores]:
        """Of each picture, with the base's own of the same prompt and noise."""
        each: tuple[Tensor, ...] = (
            self.style.gained(drawn, base),
            self.content.kept(drawn, base),
            self.content.copying(drawn),
        )
        return [Scores(*values) for values in zip(*map(Tensor.tolist, each), strict=True)]


def some_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Different ones, spread evenly, that the base draws to show what it does that copies nothing."""
    different = list(dict.fromkeys(captions))
    return tuple(different[:: max(1, -(-len(different) // NULL_CAPTIONS))])

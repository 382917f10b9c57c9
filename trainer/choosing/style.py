"""How much of the style a picture has gained, on a scale from the base's own pictures to the training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features

_LEAST_GAP = 0.05
"""Of the base's distance. Below it the base's pictures are as near to the training images as these are to each other,
and what a picture gains cannot be told from what it shows."""


@dataclass(frozen=True, eq=False)
class StyleScale:
    """0 is as far from the training images as the base's pictures are, 1 as near as they are to each other.

    The distance of a picture is the mean, over the stages of the encoder, of |G - mean G of the training images|^2,
    each stage in units of the base's own. Training images are measured against the mean of the others.
    """

    centres: tuple[Tensor, ...]
    """(C * C) of each stage: the training images' mean Gram matrix."""
    units: tuple[float, ...]
    """Of each stage: the base's own distance."""
    own: float
    """Distance of the training images to each other, with that of the base's pictures as 1."""

    @classmethod
    def fit(cls, base: Features, training: Features) -> StyleScale:
        """From the base's pictures of the very prompts whose pictures will be scored: what is asked for makes more
        difference than the style, and so it is the same on both sides."""
        centres = tuple(gram.mean(0) for gram in training.grams)
        units = tuple(
            float(_distance(gram, centre).mean()) or 1.0 for gram, centre in zip(base.grams, centres, strict=True)
        )
        return cls(centres, units, float(_own_distance(training, units).mean()))

    @property
    def is_known(self) -> bool:
        """Whether there is a style to gain."""
        return 1 - self.own >= _LEAST_GAP

    def gained(self, pictures: Features, base: Features) -> Tensor:
        """(N): by how much each picture is nearer to the training images than the base's own for the same prompt and
        noise. The unit is the gap that the base's pictures have on the average, so that the mean of pictures of the
        style is 1; a single one gains more or less, as its base picture was far from the style or near."""
        return (self._distance(base) - self._distance(pictures)) / max(1 - self.own, _LEAST_GAP)

    def _distance(self, pictures: Features) -> Tensor:
        stages = zip(pictures.grams, self.centres, self.units, strict=True)
        return torch.stack([_distance(gram, centre) / unit for gram, centre, unit in stages]).mean(0)


def _distance(grams: Tensor, centre: Tensor) -> Tensor:
    return (grams - centre).square().sum(1)


def _own_distance(training: Features, units: tuple[float, ...]) -> Tensor:
    """(N): of each training image to the mean of the others; of a single image to itself, which is 0.

    |g - mean of the others| = |g - mean of all| N / (N - 1).
    """
    count = len(training)
    apart = (count / (count - 1)) ** 2 if count > 1 else 0.0
    stages = zip(training.grams, units, strict=True)
    return apart * torch.stack([_distance(gram, gram.mean(0)) / unit for gram, unit in stages]).mean(0)

"""How near pictures of training captions come to the very images that have these captions.

That tells two checkpoints apart more finely than pictures of other prompts, for what is asked for is the same on both
sides. It says how well a run has learned, not how well it does with other prompts; so it is asked only of cells that
neither copy nor lose their prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import CAPTIONS
from .features import Features

_FEWEST = 4
"""Fewer tell too little."""


@dataclass(frozen=True, eq=False)
class LikenessScale:
    """0 as far from the image as the base's pictures are on the average, 1 the same picture: how it is drawn, what
    stands where, and which colour is where, each counting a third."""

    captions: tuple[str, ...]
    images: Features
    """Those that have the captions."""
    units: Tensor
    """(parts): the base's mean distances."""

    @classmethod
    def fit(
        cls, base: Features, asked: Sequence[str], training: Features, captions: Sequence[str]
    ) -> LikenessScale | None:
        """From the base's pictures of captions, `asked` for in this order, and the training images with theirs. None if
        too few captions belong to one image alone."""
        count = Counter(captions)
        own = [(row, captions.index(text)) for row, text in enumerate(asked) if text.strip() and count[text] == 1]
        if len(own) < _FEWEST:
            return None
        own = own[:: -(-len(own) // CAPTIONS)]
        drawn, images = base[[row for row, _ in own]], training[[image for _, image in own]]
        units = _distances(drawn, images).mean(0).clamp_min(1e-12)
        return cls(tuple(asked[row] for row, _ in own), images, units)

    def reached(self, drawn: Features) -> list[float]:
        """Of the pictures of the captions, in their order."""
        relative = _distances(drawn, self.images) / self.units
        stages = relative.shape[1] - 2
        parts = torch.stack([relative[:, :stages].mean(1), relative[:, -2], relative[:, -1]])
        return (1 - parts.mean(0)).tolist()


def _distances(pictures: Features, images: Features) -> Tensor:
    """(N, stages + 2): squared distances of Gram matrices, of layouts and of colours."""
    pairs = [*zip(pictures.grams, images.grams, strict=True)]
    pairs += [(pictures.layout, images.layout), (pictures.colours, images.colours)]
    return torch.stack([(mine - theirs).square().sum(1) for mine, theirs in pairs], dim=1)

"""What a picture shows: whether that is still what the base draws for its prompt, and whether it is a training image.

Both compare what stands where (`features.py`), and neither sees colours or strokes, which a style may change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .features import Features

RARE = 2.33
"""Deviations above the mean that 1 % of normal numbers exceed."""
FEW = 8
"""Training images; fewer say too little about how near pictures of the style are to each other by chance."""
_LEAST_SPREAD = 0.05
"""Of agreements, where there are too few pictures to tell it from; those of the pocket base have 0.08."""


@dataclass(frozen=True, eq=False)
class ContentScale:
    """Agreement is the cosine of two layouts, apart from what all pictures of the base have in common.

    Copying is by how much a picture agrees more with the nearest training image than with the usual one. To be nearer
    to all of them at once is the style, to be nearer to one of them is a copy. What happens without copies is what the
    base's pictures do, which have never seen the training images, and what these do among each other, which were not
    copied either and have the style: of both the larger mean and deviation. 0 is that mean, 1 what 1 % exceed.
    """

    centre: Tensor
    training: Tensor
    """(T, pairs): layouts of the training images, of length 1."""
    usual: float
    limit: float

    @classmethod
    def fit(cls, base: Features, training: Features, own: Tensor | None = None) -> ContentScale:
        """`own` (N, T) marks training images that show what a base's picture was asked for: the two agree by right, and
        say nothing of copies."""
        centre = base.layout.mean(0)
        layouts = _directions(training.layout, centre)
        null = [_nearness(_directions(base.layout, centre) @ layouts.T, own)]
        if len(layouts) >= FEW:
            null.append(_nearness(layouts @ layouts.T, torch.eye(len(layouts), dtype=torch.bool)))
        usual = max(float(each.mean()) for each in null)
        spread = max(float(each.std(correction=0)) for each in null)
        return cls(centre, layouts, usual, usual + RARE * max(spread, _LEAST_SPREAD))

    def kept(self, pictures: Features, base: Features) -> Tensor:
        """(N): agreement of each picture with the base's own for the same prompt and noise, -1 to 1; 1 is the same."""
        pairs = zip(*(_directions(each.layout, self.centre) for each in (pictures, base)), strict=True)
        return torch.stack([mine @ theirs for mine, theirs in pairs])

    def copying(self, pictures: Features) -> Tensor:
        """(N): 0 as pictures that copy nothing usually are, above 1 as 1 % of them."""
        return (_nearness(self.agreement(pictures), None) - self.usual) / (self.limit - self.usual)

    def nearest(self, pictures: Features) -> list[int]:
        """Of each picture the training image that it agrees with most."""
        return self.agreement(pictures).argmax(1).tolist()

    def agreement(self, pictures: Features) -> Tensor:
        """(N, T): of each picture with each training image, -1 to 1."""
        return _directions(pictures.layout, self.centre) @ self.training.T


def _directions(layout: Tensor, centre: Tensor) -> Tensor:
    return normalize(layout - centre, dim=1)


def _nearness(agreement: Tensor, own: Tensor | None) -> Tensor:
    """(N, T) to (M): the largest agreement beyond the median of the others, of M rows that are not all `own`; of no
    such row 0."""
    others = torch.zeros_like(agreement, dtype=torch.bool) if own is None else own
    rows = [row[~left_out] for row, left_out in zip(agreement, others, strict=True)]
    beyond = [_beyond_the_others(row.sort(descending=True).values) for row in rows if len(row)]
    return torch.stack(beyond) if beyond else torch.zeros(1)


def _beyond_the_others(falling: Tensor) -> Tensor:
    nearest, others = falling[0], falling[1:]
    return nearest - others.median() if len(others) else nearest

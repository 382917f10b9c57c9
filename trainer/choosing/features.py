"""What the base's own VAE encoder sees of pictures: how they are drawn, and what stands where. Nothing is downloaded.

*How they are drawn* are Gram matrices, which channels of a stage are active together, wherever that is: the style of
Gatys, Ecker and Bethge (2016, https://arxiv.org/abs/1508.06576).

*Which colour is where* is a thumbnail; no encoder is asked.

*What stands where* is self-similarity: how alike each two places of a picture are to the encoder's middle block. It
tells one thing from its ground and one part from another, and does not change when both are drawn in another ink
(Shechtman & Irani 2007; for features of a network, Tumanyan et al. 2022, https://arxiv.org/abs/2201.00424).

All pictures go through the VAE first, so that its traces are on each alike; those that a UNet has drawn went already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..encoder import batches, colour_layout, encoder_stages, pass_through

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

PLACES = 16
"""A picture is looked at in at most so many rows and columns of places."""


@dataclass(frozen=True, eq=False)
class Features:
    """Of N pictures."""

    grams: tuple[Tensor, ...]
    """For each stage of the encoder (N, C * C), C its channels: the mean over all places of the products of two."""
    layout: Tensor
    """(N, pairs of places): self-similarities, cosines of -1 to 1."""
    colours: Tensor
    """(N, 3 * areas): mean colours of equal areas, 0 to 1."""

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """One behind the other."""
        grams = tuple(torch.cat(stage) for stage in zip(*(part.grams for part in parts), strict=True))
        return cls(grams, torch.cat([part.layout for part in parts]), torch.cat([part.colours for part in parts]))

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, rows: Sequence[int]) -> Features:
        chosen = torch.tensor(list(rows), dtype=torch.long)
        return Features(tuple(gram[chosen] for gram in self.grams), self.layout[chosen], self.colours[chosen])


def features_of(vae: AutoencoderKL, images: Tensor) -> Features:
    """Of pictures that a UNet has drawn, (N, 3, H, W) in -1 to 1, N > 0."""
    return Features.joined([_of_batch(vae, batch) for batch in batches(vae, images)])


def features_of_true(vae: AutoencoderKL, images: Tensor) -> Features:
    """Of pictures that were not drawn by a UNet."""
    return features_of(vae, pass_through(vae, images))


@torch.no_grad()
def _of_batch(vae: AutoencoderKL, batch: Tensor) -> Features:
    grams: list[Tensor] = []
    last = batch
    for last in encoder_stages(vae, batch):
        grams.append(gram(last).flatten(1).cpu())
    return Features(tuple(grams), self_similarity(last).cpu(), colour_layout(batch).flatten(1).cpu())


def gram(stage: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, C): sum over places of f_i f_j / (H W)."""
    flat = stage.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def self_similarity(stage: Tensor) -> Tensor:
    """(N, C, H, W) to (N, P (P - 1) / 2): for each two of P places the cosine of what sets them off from the mean."""
    side = min(PLACES, *stage.shape[2:])
    places = adaptive_avg_pool2d(stage, side).flatten(2).transpose(1, 2)
    directions = normalize(places - places.mean(1, keepdim=True), dim=2)
    first, second = torch.triu_indices(side * side, side * side, 1)
    return (directions @ directions.transpose(1, 2))[:, first, second]

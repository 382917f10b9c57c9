"""Pictures as tensors, and what a base's VAE makes of them. They have values in -1 to 1 and the shape (N, 3, H, W)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_PIXELS_AT_ONCE = 16 * 64 * 64
"""That go through the VAE together, or one picture: bounds memory, and changes no result."""


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as (N, 3, H, W) in -1 to 1."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def colour_layout(images: Tensor, size: int = 16) -> Tensor:
    """Which colour is where: averages over size x size equal areas, [N, 3, size, size] in 0 to 1."""
    return adaptive_avg_pool2d((images.float() + 1) / 2, size)


@torch.no_grad()
def pass_through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode (the posterior's mean, so nothing is random) and decode: [N, 3, H, W] in, the same shape out."""
    return torch.cat([_reconstruct(vae, batch) for batch in batches(vae, images)])


@torch.no_grad()
def encoder_stages(vae: AutoencoderKL, batch: Tensor) -> Iterator[Tensor]:
    """What the encoder makes of a batch after each of its blocks, the down blocks and the middle one.

    Each is (N, channels, height, width) in fp32; the first are large, so take what is needed of one before the next.
    """
    hidden = vae.encoder.conv_in(batch)
    for block in [*vae.encoder.down_blocks, vae.encoder.mid_block]:
        hidden = block(hidden)
        yield hidden.float()


def batches(vae: AutoencoderKL, images: Tensor) -> list[Tensor]:
    """The images (N, 3, H, W), N > 0, in parts that go through the VAE together, as it takes them."""
    at_once = max(1, _PIXELS_AT_ONCE // images[0, 0].numel())
    return [batch.to(vae.device, vae.dtype) for batch in images.split(at_once)]


def _reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    latents = vae.encode(images, return_dict=False)[0].mode()
    decoded = vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return decoded.float().clamp(-1, 1).cpu()

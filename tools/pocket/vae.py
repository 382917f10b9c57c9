"""The pocket base's VAE: AutoencoderKL of factor 4, trained on pictures of two styles and on recoloured ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import l1_loss

ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "sample_size": 64,
}
BATCH = 16
LR = 2e-3
KL_WEIGHT = 1e-6
RECOLOURED = 0.4
"""Share of pictures shown in other colours, so that the VAE can also draw styles that none of its pictures has."""


def train_vae(pictures: Tensor, steps: int, seed: int, tell: Callable[[str], None]) -> AutoencoderKL:
    """Train on `pictures`, (N, 3, H, W) in -1 to 1; the scaling factor in its config gives unit variance."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(**ARCHITECTURE)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, weight_decay=0, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        chosen = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        loss = reconstruction_loss(vae, augmented(chosen, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            tell(f"VAE: step {step + 1} of {steps}, loss {loss.item():.4f}")
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / latents_of(vae, pictures).std().item())
    return vae


def reconstruction_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """L1 of pixels and of their differences to the neighbours, and a faint KL term (Rombach et al. 2022)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures, return_dict=False)[0]
        decoded = vae.decode(posterior.sample(generator), return_dict=False)[0].float()  # pyright: ignore
    edges = sum(l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3))
    return l1_loss(decoded, pictures) + edges + KL_WEIGHT * posterior.kl().mean()


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them mirrored; a share RECOLOURED with mixed channels, tinted, some of those inverted."""
    shape = (len(pictures), 1, 1, 1)
    mirrored = torch.rand(shape, generator=generator) < 0.5
    pictures = torch.where(mirrored, pictures.flip(-1), pictures)
    mix = torch.rand(len(pictures), 3, 3, generator=generator)
    mixed = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True), pictures)
    inverted = torch.rand(shape, generator=generator) < 0.3
    mixed = torch.where(inverted, -mixed, mixed)
    tint = 2 * torch.rand(len(pictures), 3, 1, 1, generator=generator) - 1
    mixed = torch.lerp(mixed, tint.expand_as(mixed), 0.4 * torch.rand(shape, generator=generator))
    recoloured = torch.rand(shape, generator=generator) < RECOLOURED
    return torch.where(recoloured, mixed, pictures)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posteriors' means, (N, 4, H / 4, W / 4), unscaled."""
    return torch.cat([vae.encode(batch, return_dict=False)[0].mode() for batch in pictures.split(64)])

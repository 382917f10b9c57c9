"""The pocket base's VAE: AutoencoderKL of factor 4, trained on pictures of two styles and on recoloured ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, l1_loss

from lorasmith.trainer.device import has_bf16_on_cpu

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
FACTOR = 4
BATCH = 16
LR = 1e-3
WARMUP = 100
KL_WEIGHT = 1e-7
FIRST_LOG_VARIANCE = -6.0
"""Of the posterior at the start. From 0, where the noise is louder than the picture, the decoder learns in the first
steps not to listen to some channels, and they stay silent for ever."""
Tell = Callable[[str], None]
RECOLOURED = 0.4
"""Share of pictures shown in other colours, so that the VAE can also draw styles that none of its pictures has."""


def new_vae(seed: int) -> AutoencoderKL:
    """The VAE with random weights."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**ARCHITECTURE)  # pyright: ignore[reportArgumentType]
    channels = vae.config["latent_channels"]
    nn.init.constant_(vae.quant_conv.bias[channels:], FIRST_LOG_VARIANCE)  # pyright: ignore
    return vae


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int, seed: int, tell: Tell) -> None:
    """Train on `pictures`, (N, 3, H, W) in -1 to 1, and set the scaling factor that gives unit variance."""
    _train(vae, list(vae.parameters()), pictures, steps, seed, tell)
    vae.register_to_config(scaling_factor=1 / latents_of(vae, pictures).std().item())


def train_decoder(vae: AutoencoderKL, pictures: Tensor, steps: int, seed: int, tell: Tell) -> None:
    """Train the decoder alone: latents stay what they were, and so does what a UNet learned of them."""
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]  # pyright: ignore
    _train(vae, trained, pictures, steps, seed, tell)


def _train(
    vae: AutoencoderKL, trained: list[nn.Parameter], pictures: Tensor, steps: int, seed: int, tell: Tell
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0, betas=(0.9, 0.99), fused=True)
    vae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        chosen = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        loss = reconstruction_loss(vae, augmented(chosen, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            spread = ", ".join(f"{std:.2f}" for std in latents_of(vae, chosen).std((0, 2, 3)).tolist())
            tell(f"VAE: step {step + 1} of {steps}, loss {loss.item():.4f}, spread of each latent channel {spread}")
    vae.eval().requires_grad_(False)


def reconstruction_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """L1 of pixels, of their differences to the neighbours and of the colours of areas; a faint KL term.

    The KL-regularised autoencoder of Rombach et al. 2022; its perceptual and adversarial terms would need other models.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_on_cpu()):
        posterior = vae.encode(pictures, return_dict=False)[0]
        decoded = vae.decode(posterior.sample(generator), return_dict=False)[0].float()  # pyright: ignore
    edges = sum(l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3))
    areas = l1_loss(avg_pool2d(decoded, FACTOR), avg_pool2d(pictures, FACTOR))
    return l1_loss(decoded, pictures) + edges + areas + KL_WEIGHT * posterior.kl().mean()


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

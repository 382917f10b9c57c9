"""Diffusion training as pure functions with the papers' names.

x0 are clean latents, eps Gaussian noise, both (batch, 4, h, w); t are time-steps, (batch,), whole numbers below T;
alphas_cumprod is the noise schedule, (T,): the share of signal left at each time-step.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


def derive_seed(*parts: int) -> int:
    """A seed from a few numbers, such as (seed, step, batch). With it, what is random is a function of where we are,
    and a resumed run draws what an unbroken one would have drawn."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def sample_posterior(mean: Tensor, std: Tensor, scaling_factor: float, generator: torch.Generator) -> Tensor:
    """A fresh sample of the VAE's posterior, scaled to about unit variance: x0."""
    return (mean + std * torch.randn(mean.shape, generator=generator)) * scaling_factor


def sample_noise(x0: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """eps; with `offset`, a constant is added to each channel (Guttenberg 2023, "Diffusion with offset noise")."""
    eps = torch.randn(x0.shape, generator=generator)
    if offset:
        eps = eps + offset * torch.randn((*x0.shape[:2], 1, 1), generator=generator)
    return eps


def sample_timesteps(batch: int, total: int, generator: torch.Generator) -> Tensor:
    """Uniform time-steps (Ho et al. 2020)."""
    return torch.randint(total, (batch,), generator=generator)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The forward process: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps (Ho et al. 2020, eq. 4)."""
    a_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps


def target_of(prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the model should say: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans & Ho 2022, appendix D)."""
    if prediction == "epsilon":
        return eps
    a_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a_t.sqrt() * eps - (1 - a_t).sqrt() * x0


def signal_to_noise(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """SNR(t) = a_t / (1 - a_t), (batch,)."""
    return alphas_cumprod[t] / (1 - alphas_cumprod[t])


def min_snr_weight(prediction: Prediction, t: Tensor, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Loss weights, (batch,): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al. 2023). gamma 0: all one."""
    if gamma == 0:
        return torch.ones_like(t, dtype=torch.float32)
    snr = signal_to_noise(t, alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def weighted_mse(predicted: Tensor, target: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each image times its weight, (batch,), in fp32.

    `mask` (batch, 1, h, w) multiplies the error of each latent before the mean, as kohya's masked loss does: an image
    of which little counts changes the weights less.
    """
    error = (predicted.float() - target.float()).square()
    return (error if mask is None else error * mask).flatten(1).mean(1) * weight

"""Diffusion training as pure functions with the papers' names.

x0 are clean latents, eps Gaussian noise, both (batch, 4, h, w); t are time-steps, (batch,), whole numbers below T;
alphas_cumprod is the noise schedule, (T,): the share of signal left at each time-step, which may end in 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .config import Loss, ObjectiveSection, Weighting

Prediction = Literal["epsilon", "v_prediction"]
HuberSchedule = Literal["constant", "exponential", "snr"]


def derive_seed(*parts: int) -> int:
    """A seed from a few numbers, such as (seed, step, image). With it, what is random is a function of where we are,
    and a resumed run draws what an unbroken one would have drawn."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# what is random


@dataclass(frozen=True)
class Draws:
    """All that is random of the images of a batch."""

    caption: Tensor
    """Uniform numbers below 1, (batch,): below the caption dropout, the image is shown without its caption."""
    t: Tensor
    """Time-steps, (batch,)."""
    x0: Tensor
    """Clean latents, (batch, 4, h, w)."""
    eps: Tensor
    """The noise that the model is asked for, (batch, 4, h, w)."""
    shown_eps: Tensor
    """The noise in what the model sees, (batch, 4, h, w): eps, or with input perturbation a little more."""


def draw_batch(
    mean: Tensor, std: Tensor, scaling_factor: float, objective: ObjectiveSection, total: int, seeds: Sequence[int]
) -> Draws:
    """What is random of a batch, from the VAE's posteriors (batch, 4, h, w). Each image has a seed of its own, so that
    its draws do not depend on which others share its batch."""
    posteriors = zip(mean.split(1), std.split(1), strict=True)
    each = [
        draw_image(*posterior, scaling_factor, objective, total, seed)
        for posterior, seed in zip(posteriors, seeds, strict=True)
    ]
    return together(each)


def together(each: Sequence[Draws]) -> Draws:
    """One batch of several; their latents are of one shape."""
    return Draws(*(torch.cat([getattr(draws, field.name) for draws in each]) for field in fields(Draws)))


def draw_image(
    mean: Tensor, std: Tensor, scaling_factor: float, objective: ObjectiveSection, total: int, seed: int
) -> Draws:
    """What is random of one image, from the VAE's posterior (1, 4, h, w) and the number of time-steps T = `total`."""
    generator = torch.Generator().manual_seed(seed)
    caption = torch.rand(1, generator=generator)
    first, last = objective.min_timestep, min(objective.max_timestep, total - 1)
    if objective.timesteps == "uniform":
        t = sample_timesteps(1, first, last, generator)
    else:
        t = sample_logit_normal(1, first, last, objective.timestep_mean, objective.timestep_std, generator)
    x0 = sample_posterior(mean, std, scaling_factor, generator)
    eps = sample_noise(x0, objective.noise_offset, generator)
    if objective.multires_noise_iterations:
        iterations, discount = objective.multires_noise_iterations, objective.multires_noise_discount
        eps = add_coarser_noise(eps, iterations, discount, generator)
    return Draws(caption, t, x0, eps, perturb(eps, objective.input_perturbation, generator))


def sample_posterior(mean: Tensor, std: Tensor, scaling_factor: float, generator: torch.Generator) -> Tensor:
    """A fresh sample of the VAE's posterior, scaled to about unit variance: x0."""
    return (mean + std * torch.randn(mean.shape, generator=generator)) * scaling_factor


def sample_noise(x0: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """eps; with `offset`, a constant is added to each channel (Guttenberg 2023, "Diffusion with offset noise")."""
    eps = torch.randn(x0.shape, generator=generator)
    if offset:
        eps = eps + offset * torch.randn((*x0.shape[:2], 1, 1), generator=generator)
    return eps


def add_coarser_noise(eps: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Multi-resolution noise (Whitaker 2023, https://wandb.ai/johnowhitaker/multires_noise): Gaussian noise of sides
    h / r^i, w / r^i is enlarged to h, w and added with the factor discount^i, for i from 0 to below `iterations` or
    until a side is 1; r is drawn from 2 to 4 for each. As in sd-scripts, sides count from those of eps. Each image
    comes back with standard deviation 1."""
    height, width = eps.shape[2:]
    for i in range(iterations):
        shrink = (2 + 2 * torch.rand((), generator=generator).item()) ** i
        sides = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn((*eps.shape[:2], *sides), generator=generator)
        eps = eps + discount**i * interpolate(coarse, (height, width), mode="bilinear")
        if 1 in sides:
            break
    return eps / eps.std((1, 2, 3), keepdim=True)


def perturb(eps: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """eps + gamma xi, xi Gaussian: x_t is made with it, while the target keeps eps, so that the model learns to mend
    the errors of its own earlier steps (Ning et al. 2023, "Input perturbation reduces exposure bias")."""
    return eps + gamma * torch.randn(eps.shape, generator=generator) if gamma else eps


def sample_timesteps(batch: int, first: int, last: int, generator: torch.Generator) -> Tensor:
    """Uniform time-steps (Ho et al. 2020), (batch,), from `first` to `last`, both included."""
    return torch.randint(first, last + 1, (batch,), generator=generator)


def sample_logit_normal(
    batch: int, first: int, last: int, mean: float, std: float, generator: torch.Generator
) -> Tensor:
    """Time-steps whose place in the range is the sigmoid of a normal number (Esser et al. 2024, section 3.1), (batch,),
    from `first` to `last`, both included. A `mean` above 0 is more noise."""
    place = (mean + std * torch.randn(batch, generator=generator)).sigmoid()
    return (first + place * (last - first + 1)).long().clamp(max=last)  # a sigmoid can round to 1


# ---------------------------------------------------------------------------------------------------------------------
# what is asked of the model


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


# ---------------------------------------------------------------------------------------------------------------------
# how its errors count


def loss_weight(
    weighting: Weighting, prediction: Prediction, t: Tensor, alphas_cumprod: Tensor, gamma: float
) -> Tensor:
    """What the loss of each image is multiplied by, (batch,); `gamma` is that of min-snr and soft-min-snr."""
    snr = signal_to_noise(t, alphas_cumprod)
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "debiased":
        return debiased_weight(prediction, snr)
    weight = min_snr_weight(snr, gamma) if weighting == "min-snr" else soft_min_snr_weight(snr, gamma)
    # the square of an error in v is that in eps times (SNR + 1) / SNR, which is 1 / a_t
    return weight if prediction == "epsilon" else weight * alphas_cumprod[t]


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for eps, so min(SNR, gamma) / (SNR + 1) for v (Hang et al. 2023)."""
    return (gamma / snr).clamp(max=1)


def soft_min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """SNR gamma / (SNR + gamma) for x0 (Crowson et al. 2024, HDiT), so gamma / (SNR + gamma) for eps and
    SNR gamma / ((SNR + gamma) (SNR + 1)) for v."""
    return gamma / (snr + gamma)


def debiased_weight(prediction: Prediction, snr: Tensor) -> Tensor:
    """1 / sqrt(SNR) for eps (Yu et al. 2023), and 1 / (SNR + 1) for v, as sd-scripts has it; SNR is 1000 at most."""
    snr = snr.clamp(max=1000)
    return snr.rsqrt() if prediction == "epsilon" else 1 / (snr + 1)


def image_loss(loss: Loss, predicted: Tensor, target: Tensor, huber_c: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over each image of its squared errors (mse), their sizes (l1) or the pseudo-Huber loss, (batch,), in
    fp32; `huber_c` (batch,) is used by the last.

    `mask` (batch, 1, h, w) multiplies the error of each latent before the mean, as kohya's masked loss does: an image
    of which little counts changes the weights less.
    """
    difference = predicted.float() - target.float()
    if loss == "mse":
        error = difference.square()
    elif loss == "l1":
        error = difference.abs()
    else:
        error = pseudo_huber(difference, huber_c.view(-1, 1, 1, 1))
    return (error if mask is None else error * mask).flatten(1).mean(1)


def pseudo_huber(difference: Tensor, c: Tensor) -> Tensor:
    """2c (sqrt(d^2 + c^2) - c) (Charbonnier et al. 1997), as sd-scripts scales it: d^2 far below c, 2c |d| far above;
    written so that nothing cancels where d is much smaller than c."""
    return 2 * c * difference.square() / (torch.hypot(difference, c) + c)


def scheduled_huber_c(schedule: HuberSchedule, c: float, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """c at each time-step, (batch,), as sd-scripts has it (Khrapov et al. 2024): the same at each (constant), from 1 to
    c as c^(t/T) (exponential), or (1 - c) / (1 + sigma)^2 + c with sigma = sqrt((1 - a_t) / a_t) (snr)."""
    a_t = alphas_cumprod[t]
    if schedule == "constant":
        return torch.full_like(a_t, c)
    if schedule == "exponential":
        return torch.full_like(a_t, c) ** (t / len(alphas_cumprod))
    return (1 - c) * a_t / (a_t.sqrt() + (1 - a_t).sqrt()).square() + c

"""The optimizer and the learning-rate schedule, by name."""

from __future__ import annotations

import math
from typing import Literal

import torch

from .config import OptimizerSection

Schedule = Literal["constant", "cosine", "linear"]


def make_optimizer(settings: OptimizerSection, groups: list[dict], fused: bool = True) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over parameter groups, each with its own learning rate.

    `fused` is its fast form; under fp16's gradient scaler it would hide which steps were skipped.
    """
    return torch.optim.AdamW(groups, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay, fused=fused)


def schedule_factor(schedule: Schedule, step: int, steps: int, warmup: float) -> float:
    """What the learning rates are multiplied with at `step` (the first is 0) of `steps`.

    It rises linearly over the first `warmup` share of the steps, never from exactly zero, then stays, or falls to zero
    along a cosine (Loshchilov & Hutter 2017) or a line.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule == "linear" else 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, base_rates: list[float], factor: float) -> list[float]:
    """Set each group's rate to its base rate times `factor`, and return them."""
    rates = [rate * factor for rate in base_rates]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return rates

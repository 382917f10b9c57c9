"""How much a model computes for one image, and how much this computer can at best: FLOPs, multiply-add counted as 2."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..anatomy import skeleton
from ..bases import BaseInfo
from ..config import RunConfig
from ..denoiser import Denoiser
from ..fitting import put_on
from ..models import Base, Conditions, Tokens, saved_tokenizer

_SIDE, _TRIES = {"cpu": 2048, "cuda": 8192}, {"cpu": 4, "cuda": 20}


@dataclass(frozen=True)
class Work:
    """TFLOP for one image, of the denoiser and of the text encoders where they are trained."""

    forward: float
    backward: float
    weights: int
    """Of UNet and text encoders, how many."""

    @property
    def tflop(self) -> float:
        return self.forward + self.backward


def work_of(info: BaseInfo, config: RunConfig, side: int) -> Work:
    """Of a picture of so many pixels a side, counted on shapes alone.

    It is what cannot be spared: what is cached and what is recomputed to save memory do not count, nor what the
    optimizer does. Attention counts as its two products, forward, and four of that size, backward.
    """
    base = skeleton(info)
    weights = sum(parameter.numel() for module in base.components.values() for parameter in module.parameters())
    put_on(base, config.adapter, config.seed, config.block, config.trigger)
    denoiser, latents = Denoiser(base, config.adapter.trains_text), side // info.vae_factor
    with torch.device("meta"):
        noisy, t, sizes = torch.zeros(1, 4, latents, latents), torch.zeros(1, dtype=torch.long), torch.zeros(1, 6)
        text = _text(base, config.adapter.trains_text)
    with FlopCounterMode(display=False) as counter:
        predicted: Tensor = denoiser(noisy, t, text, sizes)
        forward = counter.get_total_flops()
        predicted.sum().backward()
    return Work(forward / 1e12, (counter.get_total_flops() - forward) / 1e12, weights)


def _text(base: Base, encoders_train: bool) -> Tokens | Conditions:
    """A caption that fills the text encoder, of which nothing but its shape is known."""
    length, unet = _tokens(base), base.unet.config
    if encoders_train:
        return Tokens([torch.zeros(1, length, dtype=torch.long)] * len(base.text_encoders), [1])
    pooled = None
    if base.info.family == "sdxl":
        pooled = torch.zeros(1, unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim)
    return Conditions(torch.zeros(1, length, unet.cross_attention_dim), pooled)


def _tokens(base: Base) -> int:
    """How many a caption has: as many as the text encoder has places for, unless the base's own tokenizer says less."""
    source = base.info.source
    if source.startswith("random:") or Path(source).is_file():
        return base.text_encoders["text_encoder"].config.max_position_embeddings
    return cast(int, saved_tokenizer(base.info, "tokenizer").model_max_length)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP that this device does in a second of multiplying large matrices: the best of a few tries.

    On a CPU it is a second of the process's time, all threads together, for a neighbour takes nothing of that.
    """
    clock, side = (time.process_time if device.type == "cpu" else time.perf_counter), _of_kind(_SIDE, device)
    generator = torch.Generator(device).manual_seed(0)  # random, for zeros take less power and let a GPU run faster
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_of_kind(_TRIES, device)):
        synchronise(device)
        began = clock()
        torch.mm(a, b)
        synchronise(device)
        seconds.append(clock() - began)
    return 2 * side**3 / min(seconds) / 1e12


def _of_kind(values: dict[str, int], device: torch.device) -> int:
    return values["cpu" if device.type == "cpu" else "cuda"]


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

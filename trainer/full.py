"""Full fine-tuning: the base's own weights are trained, all of them or those of some blocks; the rest stays frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, Problem
from .models import Base, load_base
from .paths import blocks, lies_in, path_of


def unfreeze(base: Base, components: Mapping[str, Any], train_only: Sequence[str]) -> None:
    """Let the weights of `components` be trained; with `train_only`, those of the named blocks.

    A name is a path as diffusers and transformers have it, after the component's name: `unet.up_blocks.1`,
    `text_encoder.encoder.layers`. A `*` stands for anything: `unet.*.attentions` are all of them.

    Raises:
        ConfigError: for every name that matches nothing.
    """
    idle, read = set(train_only), []
    for component, module in components.items():
        unread = base.family.unread_layers(component, module)
        for name, parameter in module.named_parameters():
            if unread and re.fullmatch(unread, name):
                continue
            read.append(path := path_of(component, name))
            chosen = [block for block in train_only if lies_in(path, block)]
            idle -= set(chosen)
            parameter.requires_grad_(not train_only or bool(chosen))
    if idle:
        fix = f"Blocks are: {', '.join(blocks(read))}."
        unknown = [block for block in train_only if block in idle]
        raise ConfigError.of(
            Problem("adapter.train_only", f"{block} is no block of what is trained", fix) for block in unknown
        )


def trained_weights(base: Base) -> dict[str, nn.Parameter]:
    """The weights that are trained, by component and diffusers' name."""
    return {
        f"{component}.{name}": parameter
        for component, module in base.components.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@contextmanager
def interpolated(base: Base, factor: float) -> Iterator[None]:
    """Within the block the trained weights are (1 - factor) x the base's + factor x their own; 0 is the untouched base.

    Interpolation of original and tuned weights (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903). The original
    is read from disk, because a second copy in memory would burden every run that never asks for it.
    """
    live, tuned = trained_weights(base), {}
    original = {
        f"{c}.{n}": p for c, module in load_base(base.info).components.items() for n, p in module.named_parameters()
    }
    try:
        with torch.no_grad():
            for name, parameter in live.items():
                tuned[name] = parameter.detach().cpu().clone()
                parameter.copy_(torch.lerp(original[name], tuned[name].float(), factor))
        yield
    finally:
        with torch.no_grad():
            for name, weight in tuned.items():
                live[name].copy_(weight)

"""Full fine-tuning: the base's own weights are trained, all of them or those of some blocks; the rest stays frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, Problem
from .models import Base, load_base
from .paths import blocks, lies_in, path_of
from .strengths import Strengths


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
def interpolated(base: Base, strengths: Strengths) -> Iterator[None]:
    """Within the block the trained weights are (1 - s) x the base's + s x their own; after it they are as before.

    Interpolation of original and tuned weights (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903), with a
    strength s for each block. The original is read from disk, because a second copy in memory would burden every run
    that never asks for it; while the block lasts, what was trained lies in memory in its place.
    """
    live = trained_weights(base)
    factors = {name: strengths.of(*name.split(".", 1)) for name in live}
    moved = [name for name, factor in factors.items() if factor != 1]
    tuned: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            original = original_weights(base, moved) if moved else {}
            for name in moved:
                tuned[name] = live[name].detach().cpu().clone()
                live[name].copy_(torch.lerp(original.pop(name), tuned[name].float(), factors[name]))
        yield
    finally:
        with torch.no_grad():
            for name, weight in tuned.items():
                live[name].copy_(weight)


def original_weights(base: Base, names: Iterable[str]) -> dict[str, Tensor]:
    """Of the base's own weights those of these names, fp32, on the CPU."""
    components = load_base(base.info).components
    return {
        name: components[component].get_parameter(path) for name in names for component, path in [name.split(".", 1)]
    }

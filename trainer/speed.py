"""How a base with its adapter computes, lean or fast, as `[runtime]` says: the same in a run and in its plan."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .activations import keep_less
from .adapter import tuner_layers
from .config import RunConfig
from .cpukernels import speed_up_on_cpu
from .fastlora import speed_up
from .models import Base


def recompute_activations(base: Base, config: RunConfig) -> None:
    """Let what trains, or some blocks of it, compute its activations again in the backward pass, if that is set."""
    count = config.runtime.checkpointed_blocks
    if not config.runtime.gradient_checkpointing:
        return
    base.unet.enable_gradient_checkpointing()
    for block in blocks_by_size(base.unet)[count:] if count else ():
        _keep_activations(block)
    for encoder in base.text_encoders.values() if config.adapter.trains_text and not count else ():
        enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name in newer transformers
        (enable or encoder.gradient_checkpointing_enable)()
        encoder.train()
    base.unet.train()  # both libraries recompute only in training mode; neither has dropout here


def blocks_by_size(unet: Any) -> list[nn.Module]:
    """The blocks of a UNet, those first whose feature maps have most pixels; of two alike that of the way up, which
    takes in what that of the way down has made."""
    alike = zip(reversed(unet.up_blocks), unet.down_blocks, strict=True)
    return [*(block for two in alike for block in two), *([unet.mid_block] if unet.mid_block else [])]


def _keep_activations(block: nn.Module) -> None:
    for module in block.modules():
        if hasattr(module, "gradient_checkpointing"):
            cast(Any, module).gradient_checkpointing = False


def compute_fast(base: Base, config: RunConfig, dtype: torch.dtype, latents: int, on_cpu: bool) -> bool:
    """Let the base and its plain LoRA layers compute the fast way; returns whether they still need autocast.

    Args:
        dtype: of the base's weights.
        latents: those of the largest batch, all together.
        on_cpu: whether that is what will compute; a base of shapes alone does not know it.
    """
    components = base.components.values()
    if config.runtime.lean_activations:
        keep_less(base.unet, config.runtime.compile)
    if config.runtime.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    elif config.runtime.cpu_kernels and on_cpu:
        speed_up_on_cpu(base.unet, latents, config.runtime.compile)
    fast = sum(map(speed_up, components)) if config.runtime.fast_lora else 0
    all_are_fast = fast == sum(1 for component in components for _ in tuner_layers(component))
    is_lean = dtype == torch.bfloat16 and all_are_fast and not config.adapter.new_tokens
    return config.runtime.autocast or not is_lean

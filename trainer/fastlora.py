"""A faster forward and backward of PEFT's plain LoRA layers, with the same result.

PEFT makes, names and saves the layers. Its forward is five to ten small operations a layer, and keeps what each of them
read for the backward pass. Here it is one function that keeps the input, which it shares with others that read the
same, and the input's projection onto the rank. Everything that is not a plain LoRA on a linear layer (DoRA, dropout,
convolutions) goes PEFT's own way, and so does a layer while it is switched off or merged.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .adapter import ADAPTER, tuner_layers


def speed_up(component: nn.Module) -> int:
    """Let the plain LoRA layers of a component compute the fast way; returns how many do."""
    plain = [layer for _, layer in tuner_layers(component) if isinstance(layer, LoraLinear) and _is_plain(layer)]
    for layer in plain:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(plain)


def _is_plain(layer: LoraLinear) -> bool:
    """Whether y = W x + b + scale B A x is all that the layer does, while its adapter is on."""
    return (
        type(layer.get_base_layer()) is nn.Linear
        and not layer.fan_in_fan_out
        and list(layer.lora_A) == [ADAPTER]
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and cast(Any, layer.lora_A[ADAPTER]).bias is None
        and cast(Any, layer.lora_B[ADAPTER]).bias is None
    )


def _forward(layer: Any, peft_forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or layer.disable_adapters or layer.merged:
        return peft_forward(x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return cast(Tensor, _LoraLinear.apply(x, base.weight, base.bias, down, up, layer.scaling[ADAPTER]))


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T of a frozen W (out, in), for A (rank, in) and B (out, rank) in fp32.

    The products are taken in the precision of W, as under autocast. With g the gradient of y and h = scale g B:
    dx = g W + h A, dA = h^T x, dB = scale g^T (x A^T) (Hu et al. 2022, section 4.1, differentiated).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
        low = scale * (rows @ down.to(weight.dtype).T)
        y = linear(rows, weight, bias).addmm_(low, up.to(weight.dtype).T)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        g = gradients[0].to(weight.dtype).reshape(-1, weight.shape[0])
        h = ctx.scale * (g @ up.to(weight.dtype))
        d_down, d_up = (h.T @ rows).to(down.dtype), (g.T @ low).to(up.dtype)
        if not ctx.needs_input_grad[0]:  # as of cross-attention's keys and values: captions learn nothing
            return None, None, None, d_down, d_up, None
        dx = (g @ weight).addmm_(h, down.to(weight.dtype))
        return dx.view(ctx.shape).to(ctx.dtype), None, None, d_down, d_up, None

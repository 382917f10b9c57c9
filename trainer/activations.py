"""What a UNet keeps for its backward pass: nothing large that follows at once from something that is kept in any case.

PyTorch keeps the input of each operation that may need it. A convolution keeps its own for the gradient of its weight,
which is frozen here; SiLU after a group norm keeps the norm's output, and a gated unit the gate's activation and what
it is multiplied with, though a moment's work makes them again. The result is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu

FEW = 2**17
"""Numbers: what is smaller is kept. Measured on a CPU: below it, what keeps less takes a tenth more time and up to a
half, and hardly any memory is in such tensors."""
_TOWARDS_INPUT = [True, False, False]
"""Of the gradients of input, weight and bias, which are wanted."""


def keep_less(unet: nn.Module, compiled: bool = False) -> int:
    """Let the frozen layers of a UNet keep less; returns how many do. If it will be `compiled`, gated units are left to
    the compiler, which decides for itself what to keep of a block."""
    forwards = {module: forward for module in unet.modules() if (forward := _leaner(module, compiled))}
    for module, forward in forwards.items():
        module.forward = forward
    return len(forwards)


def _leaner(module: nn.Module, compiled: bool) -> Callable[..., Tensor] | None:
    """The forward of a layer that keeps less; None if there is none."""
    if isinstance(module, nn.Conv2d) and _is_frozen(module) and _is_plain(module):
        return partial(_convolved, module)
    if isinstance(module, ResnetBlock2D) and _is_usual(module) and all(map(_is_frozen, (module.norm1, module.norm2))):
        return partial(_residual, module)
    if type(module) is GEGLU and not compiled:
        return partial(_gated, module)
    return None


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _is_plain(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and isinstance(convolution.padding, tuple)


def _is_usual(block: Any) -> bool:
    """Whether a residual block is one of Stable Diffusion's: SiLU after each norm, and the time added between them."""
    resizes, rest = block.upsample or block.downsample, (block.time_embedding_norm, block.output_scale_factor)
    return not resizes and rest == ("default", 1) and not block.skip_time_act and type(block.nonlinearity) is nn.SiLU


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


def _convolved(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    if x.numel() < FEW:
        return convolution._conv_forward(x, convolution.weight, convolution.bias)
    return cast(Tensor, _Convolution.apply(convolution, x))


class _Convolution(torch.autograd.Function):
    """A frozen convolution of x (batch, in, h, w), of which only the shape is kept."""

    @staticmethod
    def forward(ctx: Any, convolution: nn.Conv2d, x: Tensor) -> Tensor:
        ctx.convolution, ctx.shape, ctx.dtype = convolution, x.shape, x.dtype
        return convolution._conv_forward(x, convolution.weight, convolution.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        [gradient], its = gradients, ctx.convolution
        like, weight = gradient.new_empty(1).expand(ctx.shape), its.weight.to(gradient.dtype)
        form = (its.stride, its.padding, its.dilation, False, [0, 0], its.groups)
        found = torch.ops.aten.convolution_backward(gradient, like, weight, None, *form, _TOWARDS_INPUT)
        return None, found[0].to(ctx.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# residual blocks


def _residual(block: Any, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
    """The block of diffusers, of (batch, channels, h, w), with each norm and its SiLU as one function."""
    hidden = block.conv1(_norm_then_silu(block.norm1, input_tensor))
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(silu(cast(Tensor, temb)))[:, :, None, None]
    hidden = block.conv2(block.dropout(_norm_then_silu(block.norm2, hidden)))
    if block.conv_shortcut is None:
        return hidden + input_tensor
    return hidden + block.conv_shortcut(input_tensor.contiguous() if block.training else input_tensor)


def _norm_then_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return silu(norm(x)) if x.numel() < FEW else cast(Tensor, _NormThenSilu.apply(norm, x))


class _NormThenSilu(torch.autograd.Function):
    """SiLU of a frozen group norm of x (batch, channels, h, w); x alone is kept."""

    @staticmethod
    def forward(ctx: Any, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        hidden = norm(x)
        ctx.norm, ctx.dtype = norm, hidden.dtype
        ctx.save_for_backward(x)
        return silu(hidden, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        [x], norm = ctx.saved_tensors, ctx.norm
        form = _form_for_norm(x)
        like = x.to(ctx.dtype).contiguous(memory_format=form)
        dtype = torch.promote_types(norm.weight.dtype, ctx.dtype)  # a CPU takes x in bf16 with weights in fp32
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
        sizes = (like.shape[0], like.shape[1], like[0, 0].numel(), norm.num_groups)
        hidden, mean, deviation = torch.native_group_norm(like, weight, bias, *sizes, norm.eps)
        gradient = torch.ops.aten.silu_backward(gradients[0], hidden).contiguous(memory_format=form)
        towards = torch.ops.aten.native_group_norm_backward
        found = towards(gradient, like, mean, deviation, weight, *sizes, _TOWARDS_INPUT)
        return None, found[0].to(x.dtype)


def _form_for_norm(x: Tensor) -> torch.memory_format:
    """The order in memory in which PyTorch's group norm takes x."""
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last and x.device.type == "cpu" else torch.contiguous_format


# ---------------------------------------------------------------------------------------------------------------------
# gated units


def _gated(unit: Any, hidden: Tensor) -> Tensor:
    both = unit.proj(hidden)
    return _gate(both) if both.numel() < FEW else cast(Tensor, _Gated.apply(both))


def _gate(both: Tensor) -> Tensor:
    x, gate = both.chunk(2, dim=-1)
    return x * gelu(gate)


class _Gated(torch.autograd.Function):
    """x GELU(gate) of both side by side (..., 2 width), which alone is kept (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _gate(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [both], [gradient] = ctx.saved_tensors, gradients
        x, gate = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        towards_x, towards_gate = found.chunk(2, dim=-1)
        torch.mul(gradient, gelu(gate), out=towards_x)
        towards_gate.copy_(torch.ops.aten.gelu_backward(gradient * x, gate))
        return found

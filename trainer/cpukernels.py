"""Two things of a UNet that a CPU computes faster than by PyTorch's own kernels, with the same result.

Convolutions: oneDNN writes a weight in an order of its own for each image anew, forward and backward, which over few
pixels takes longer than the convolution. Where all weights of a UNet's convolutions are small, they are kept in that
order as well, for each direction and each size of a batch. Large ones are left as they are but for those over few
pixels: these become one product of matrices, the pixels with their neighbours times the weight as it lies in memory.
Attention over short sequences: PyTorch's kernel for CPUs is made for long ones, and takes twice as long below them as
two products and a softmax.

Which of two ways is taken depends on shapes alone, so that a run that is resumed computes as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad, scaled_dot_product_attention

from .attention import Attending, is_plain, level
from .device import has_bf16_on_cpu
from .fastlora import Together

MOST_PIXELS = 128
"""Up to so many of a batch together, a convolution is a product of matrices. Measured: at 64 it takes 0.6 to 0.8 of
oneDNN's time, at 256 the same."""
MOST_KEPT_TWICE = 2**26
"""Bytes: up to so many of all convolutions together, their weights are kept in oneDNN's order besides. Measured on the
pocket base: the convolutions take between a third and two thirds of the time."""
MOST_PIXELS_IN_ORDER = 24**2
"""Of an image: a convolution over more of them is PyTorch's, which takes in other orders. Measured: at 16 x 16 one in a
kept order takes 0.7 to 0.85 of its time, at 24 x 24 nearly the same, at 64 x 64 half as much again."""
ORDERS_KEPT = 4
"""For as many sizes of a batch, the last that were used: more take memory, and fewer are written anew too often."""
SHORT = 2**20
"""Up to so many pairs of a query and a key, attention is two products and a softmax. Above, that needs much memory."""
TINY = 2**13
"""Up to so many, it is PyTorch's kernel in fp32, which has the least to do beside the products. Measured: at 64 x 77 it
takes two thirds of the time of products in bf16."""


def speed_up_on_cpu(unet: Any, latents: int, compiled: bool = False) -> None:
    """Let a frozen UNet on a CPU compute the fast way; `latents` are those of the largest batch, all together. If it
    will be `compiled`, attention and the order of weights are left to the compiler."""
    keep_twice = not compiled and _bytes_of_convolutions(unet) <= MOST_KEPT_TWICE
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            if compiled or type(module.processor) is not AttnProcessor2_0 or not is_plain(module):
                continue
            module.set_processor(cast(Any, _ShortAttention(module)))
            module.forward = partial(_attended, module, module.forward)
        elif not isinstance(module, nn.Conv2d) or not _keeps_size(module):
            continue
        elif keep_twice and _can_be_kept_twice(name, module):
            cast(Any, module).forward = _InItsOrder(module)
        elif _is_small(module, latents / 4 ** _level(unet, name)):
            _as_product(module)


def in_their_order(unet: nn.Module) -> list[nn.Conv2d]:
    """The convolutions whose weights are kept in oneDNN's order as well."""
    return [module for module in unet.modules() if isinstance(vars(module).get("forward"), _InItsOrder)]  # pyright: ignore


def suits_order(x: Tensor) -> bool:
    """Whether such a convolution takes x (batch, channels, h, w) in a kept order."""
    return x.shape[-2] * x.shape[-1] <= MOST_PIXELS_IN_ORDER


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


def _level(unet: Any, name: str) -> int:
    """How often the sides have been halved where a layer of a residual block stands; 0 elsewhere."""
    return level(unet, name) if ".resnets." in name else 0


def _keeps_size(convolution: nn.Conv2d) -> bool:
    """Whether it is frozen, and its output is as large as its input."""
    size, like = convolution.kernel_size, (convolution.stride, convolution.dilation, convolution.groups)
    is_usual = like == ((1, 1), (1, 1), 1) and convolution.padding_mode == "zeros" and size in ((1, 1), (3, 3))
    return is_usual and convolution.padding == tuple(n // 2 for n in size) and not convolution.weight.requires_grad


def _is_small(convolution: nn.Conv2d, pixels: float) -> bool:
    """Whether it is one of 3 x 3 over few pixels."""
    return pixels <= MOST_PIXELS and convolution.kernel_size == (3, 3)


def _as_product(convolution: nn.Conv2d) -> None:
    """Its weight is put in the order of the product, (out, 3, 3, in), in the same place of memory as before."""
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    cast(Any, convolution).forward = partial(_convolve, convolution)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    if x[:, 0].numel() > MOST_PIXELS:  # a preview may be larger
        return conv2d(x, weight.contiguous(), bias, padding=1)
    return cast(Tensor, _Product.apply(x, weight, bias))


def _bytes_of_convolutions(unet: nn.Module) -> int:
    return sum(module.weight.nbytes for module in unet.modules() if isinstance(module, nn.Conv2d))


def _can_be_kept_twice(name: str, convolution: nn.Conv2d) -> bool:
    """Whether it is in bf16, and oneDNN is there: in fp32 its order costs more than it saves. What an adapter may be
    merged into stays single."""
    is_known = convolution.weight.dtype == torch.bfloat16 and has_bf16_on_cpu()
    return is_known and not name.endswith(".base_layer")


class _InItsOrder:
    """The forward of a frozen convolution that keeps the size, with its weight in oneDNN's order for both directions.

    Backward, the gradient is convolved with the weight turned by half a circle, its inputs and outputs exchanged. Which
    order is best depends on the size of the input; in that for another one, oneDNN may find no fast kernel and take a
    hundred times as long.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.convolution, self.usual = convolution, convolution.forward
        self.ordered = lru_cache(2 * ORDERS_KEPT)(self._ordered)

    def _ordered(self, shape: torch.Size, is_forward: bool) -> Tensor:
        weight, ones = self.convolution.weight.detach(), [1, 1]
        directed = weight if is_forward else weight.flip(2, 3).transpose(0, 1).contiguous()
        order: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore[reportAttributeAccessIssue]
        return order(directed.to_mkldnn(), self.convolution.padding, ones, ones, 1, shape)

    def convolve(self, x: Tensor, is_forward: bool) -> Tensor:
        """Of x (batch, channels, h, w) in the precision of the weight."""
        weight, bias, ones = self.ordered(x.shape, is_forward), self.convolution.bias if is_forward else None, [1, 1]
        run = torch.ops.mkldnn._convolution_pointwise
        return run(x, weight, bias, self.convolution.padding, ones, ones, 1, "none", [], "").contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if suits_order(x):
            return cast(Tensor, _Ordered.apply(x, self))
        return self.usual(x)


class _Ordered(torch.autograd.Function):
    """A convolution by `_InItsOrder` of x (batch, in, h, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: _InItsOrder) -> Tensor:
        ctx.order, ctx.dtype = order, x.dtype
        return order.convolve(x.to(order.convolution.weight.dtype), is_forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        order = ctx.order
        gradient = gradients[0].to(order.convolution.weight.dtype)
        return order.convolve(gradient, is_forward=False).to(ctx.dtype), None


class _Product(torch.autograd.Function):
    """A 3 x 3 convolution of x (batch, in, h, w) with a frozen weight (out, in, 3, 3), each side padded by one zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, channels, height, width = x.shape
        padded = pad(x.to(weight.dtype).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        neighbours = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
        y = linear(neighbours.reshape(-1, 9 * channels), _matrix(weight), bias)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [weight] = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        g = gradients[0].to(weight.dtype).permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        neighbours = (g @ _matrix(weight)).view(batch, height, width, 3, 3, channels)
        dx = torch.zeros(batch, height + 2, width + 2, channels, dtype=torch.promote_types(weight.dtype, torch.float32))
        for row in range(3):
            for column in range(3):
                dx[:, row : row + height, column : column + width] += neighbours[:, :, :, row, column]
        return dx[:, 1:-1, 1:-1].permute(0, 3, 1, 2).to(ctx.dtype).contiguous(), None, None


def _matrix(weight: Tensor) -> Tensor:
    """(out, 9 in), of a weight that lies so in memory."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


# ---------------------------------------------------------------------------------------------------------------------
# attention


def _attended(attention: Any, usual: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of an attention with a processor of ours: diffusers' own looks at a processor's parameters at each
    call, which takes longer than a short attention."""
    if type(attention.processor) is not _ShortAttention:
        return usual(hidden_states, *args, **kwargs)
    return attention.processor(attention, hidden_states, *args, **kwargs)


class _ShortAttention(Attending):
    """Short attention, whose queries, keys and values are one product where that is possible."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attend)
        projections = [attention.to_q, attention.to_k, attention.to_v]
        alike = projections[1:] if attention.is_cross_attention else projections
        self.together = Together(alike) if Together.can_be(alike) else None

    def asked(self, attention: Any, hidden: Tensor, other: Tensor | None) -> Sequence[Tensor]:
        if self.together is None:
            return super().asked(attention, hidden, other)
        if attention.is_cross_attention:
            return attention.to_q(hidden), *self.together(hidden if other is None else other)
        return self.together(hidden)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V for (batch, heads, tokens, d) (Vaswani et al. 2017, eq. 1)."""
    pairs = query.shape[-2] * key.shape[-2]
    if pairs <= TINY and query.dtype != torch.float64:
        return scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)
    if pairs > SHORT:
        return scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value

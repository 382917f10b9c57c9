"""Two things of a UNet that a CPU computes faster than by PyTorch's own kernels, with the same result.

Convolutions over few pixels: oneDNN reads a weight of millions of numbers, and writes it in an order of its own, for
each image anew. As one product of matrices, the pixels with their neighbours times the weight as it lies in memory, it
is read once. Attention over short sequences: PyTorch's kernel for CPUs is made for long ones, and takes twice as long
below them as two products and a softmax.

Which of two ways is taken depends on shapes alone, so that a run that is resumed computes as one that was not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad, scaled_dot_product_attention

MOST_PIXELS = 128
"""Up to so many of a batch together, a convolution is a product of matrices. Measured: at 64 it takes 0.6 to 0.8 of
oneDNN's time, at 256 the same."""
SHORT = 2**20
"""Up to so many pairs of a query and a key, attention is two products and a softmax. Above, that needs much memory."""


def speed_up_on_cpu(unet: Any, latents: int) -> None:
    """Let a frozen UNet on a CPU compute the fast way; `latents` are those of the largest batch, all together."""
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and _is_plain(module):
            module.set_processor(cast(Any, _attention))
        elif isinstance(module, nn.Conv2d) and _is_small(module, latents / 4 ** _level(unet, name)):
            _as_product(module)


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


def _level(unet: Any, name: str) -> int:
    """How often the sides have been halved where a layer of a residual block stands; 0 elsewhere."""
    part, _, rest = name.partition(".")
    last = len(unet.down_blocks) - 1
    number = int(rest.partition(".")[0]) if part in ("down_blocks", "up_blocks") else 0
    levels = {"down_blocks": number, "mid_block": last, "up_blocks": last - number}
    return levels.get(part, 0) if ".resnets." in name else 0


def _is_small(convolution: nn.Conv2d, pixels: float) -> bool:
    """Whether it is a frozen 3 x 3 convolution that keeps the size, over few pixels."""
    like = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return (
        pixels <= MOST_PIXELS and like == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and not convolution.weight.requires_grad
    )


def _as_product(convolution: nn.Conv2d) -> None:
    """Its weight is put in the order of the product, (out, 3, 3, in), in the same place of memory as before."""
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    cast(Any, convolution).forward = partial(_convolve, convolution)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    if x[:, 0].numel() > MOST_PIXELS:  # a preview may be larger
        return conv2d(x, weight.contiguous(), bias, padding=1)
    return cast(Tensor, _Product.apply(x, weight, bias))


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


def _is_plain(attention: Attention) -> bool:
    """Whether it is softmax(Q K^T / sqrt(d)) V over heads, and nothing else."""
    further = (attention.group_norm, attention.spatial_norm, attention.norm_cross, attention.norm_q, attention.norm_k)
    is_further = any(one is not None for one in further) or attention.added_kv_proj_dim is not None
    return not is_further and not attention.residual_connection and attention.rescale_output_factor == 1.0


def _attention(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """An attention processor as diffusers calls it; (batch, tokens, width) to the same."""
    if attention_mask is not None or hidden_states.dim() != 3:
        return AttnProcessor2_0()(attention, hidden_states, encoder_hidden_states, attention_mask, temb)
    read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    asked = attention.to_q(hidden_states), attention.to_k(read), attention.to_v(read)
    query, key, value = (one.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for one in asked)
    seen = attend(query, key, value).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](seen))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V for (batch, heads, tokens, d) (Vaswani et al. 2017, eq. 1)."""
    if query.shape[-2] * key.shape[-2] > SHORT:
        return scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value

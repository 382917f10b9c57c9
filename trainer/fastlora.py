"""A faster forward and backward of PEFT's plain LoRA layers, with the same result.

PEFT makes, names and saves the layers. Its forward is five to ten small operations a layer, and keeps what each of them
read for the backward pass. Here it is one function that keeps the input, which it shares with others that read the
same, and the input's projection onto the rank. Layers that read the same, as attention's queries, keys and values do,
are one function together. Everything that is not a plain LoRA on a linear layer (DoRA, dropout, convolutions) goes
PEFT's own way, and so does a layer while it is switched off or merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .adapter import ADAPTER, tuner_layers
from .fewbits import FewBitsLinear, product, product_backward

_FEW = 2**16
"""Up to so many numbers of an input on a CPU, the two thin products are taken in the precision of A and B: in bf16 a
small product takes four times as long as in fp32, and A and B would have to be cast. Measured."""


def speed_up(component: nn.Module) -> int:
    """Let the plain LoRA layers of a component compute the fast way; returns how many do."""
    plain = [layer for _, layer in tuner_layers(component) if isinstance(layer, LoraLinear) and _is_plain(layer)]
    for layer in plain:
        layer.forward = _Fast(layer)
    return len(plain)


def _is_plain(layer: LoraLinear) -> bool:
    """Whether y = W x + b + scale B A x is all that the layer does, while its adapter is on."""
    return (
        type(layer.get_base_layer()) in (nn.Linear, FewBitsLinear)
        and not layer.fan_in_fan_out
        and list(layer.lora_A) == [ADAPTER]
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and cast(Any, layer.lora_A[ADAPTER]).bias is None
        and cast(Any, layer.lora_B[ADAPTER]).bias is None
    )


class _Fast:
    """The forward of a plain layer."""

    def __init__(self, layer: LoraLinear) -> None:
        self.layer, self.peft_forward = cast(Any, layer), layer.forward
        self.base, self.down, self.up = self.layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]

    @property
    def is_on(self) -> bool:
        return not (self.layer.disable_adapters or self.layer.merged)

    @property
    def scale(self) -> float:
        return self.layer.scaling[ADAPTER]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_on:
            return self.peft_forward(x, *args, **kwargs)
        pair = cast(Tensor, self.down.weight), cast(Tensor, self.up.weight)
        return _fast(x, _frozen(self.base), self.base.bias, self.scale, *pair)


class FastLinear(LoraLinear):
    """A plain layer whose class computes the fast way: what is compiled for one serves all others of its shape. A
    forward of a layer's own, as `_Fast` is, would be compiled for each layer anew."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = cast(Any, self)
        if args or kwargs or layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)
        base, pair = layer.base_layer, (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        return cast(Tensor, _LoraLinears.apply(x, _frozen(base), base.bias, layer.scaling[ADAPTER], *pair))


def _frozen(base: Any) -> Tensor | FewBitsLinear:
    """A layer's weight, or the layer where that lies in few bits."""
    return base if isinstance(base, FewBitsLinear) else base.weight


def make_compilable(module: nn.Module) -> None:
    """Let the fast layers of a module compute so by their class."""
    for _, layer in tuner_layers(module):
        if type(vars(layer).get("forward")) is _Fast:
            del vars(layer)["forward"]
            layer.__class__ = FastLinear


class Together:
    """Frozen linear layers of as many outputs that read the same, with or without a LoRA: called, they give the output
    of each, (batch, tokens, out).

    Their weights are laid side by side in memory, and stay the layers' own: nothing is kept twice.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.bases: list[nn.Linear] = [getattr(layer, "base_layer", layer) for layer in layers]
        self.whole = torch.cat([base.weight.data for base in self.bases])
        for base, weight in zip(self.bases, self.whole.chunk(len(layers)), strict=True):
            base.weight.data = weight

    @staticmethod
    def can_be(layers: Sequence[Any]) -> bool:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        plain = (type(base) is nn.Linear and base.bias is None and not base.weight.requires_grad for base in bases)
        return all(plain) and len({base.weight.shape for base in bases}) == 1

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        fast = [layer.forward for layer in self.layers if type(layer.forward) is _Fast and layer.forward.is_on]
        if len(fast) != len(self.layers) or len({one.scale for one in fast}) != 1 or not self._are_side_by_side():
            return [layer(x) for layer in self.layers]
        pairs = [cast(Tensor, weight) for one in fast for weight in (one.down.weight, one.up.weight)]
        y = _fast(x, self.whole, None, fast[0].scale, *pairs)
        return y.chunk(len(fast), -1)

    def _are_side_by_side(self) -> bool:
        """Whether the layers' weights are still where they were laid."""
        first, bytes_each = self.whole.data_ptr(), self.whole.nbytes // len(self.bases)
        return all(base.weight.data_ptr() == first + number * bytes_each for number, base in enumerate(self.bases))


class _LoraLinears(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T of a frozen W (out, in), for A (rank, in) and B (out, rank) in fp32; for
    several A and B, each B changes its share of the outputs. Where a layer keeps W in few bits, it is given in place of
    W, makes it in either direction, and is all that is kept of it.

    The products are taken in the precision of W, as under autocast, or better. With g the gradient of y and
    h = scale g B: dx = g W + h A, dA = h^T x, dB = scale g^T (x A^T) (Hu et al. 2022, section 4.1, differentiated).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Tensor | FewBitsLinear, bias: Tensor | None, scale: float, *pairs: Tensor
    ) -> Tensor:
        rows = x.to(frozen.dtype).reshape(-1, x.shape[-1])
        thin = _thin(rows, pairs[0])
        ups = pairs[1::2]
        low = (rows.to(thin) @ _one(pairs[0::2]).to(thin).T).mul_(scale)
        y = product(rows, frozen, bias)
        for part, own, up in zip(_parts(y, ups, 0), _parts(low, ups, 1), ups, strict=True):
            _add_product(part, own, up.to(thin).T)
        ctx.frozen, weight = (None, frozen) if isinstance(frozen, Tensor) else (frozen, None)
        ctx.save_for_backward(rows, low, weight, *pairs)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, *pairs = ctx.saved_tensors
        downs, ups = pairs[0::2], pairs[1::2]
        g = gradients[0].to(rows.dtype).reshape(-1, gradients[0].shape[-1])
        thin_g = g.to(low.dtype)
        shares = _parts(thin_g, ups, 0)
        h = _one([share @ up.to(low.dtype) for share, up in zip(shares, ups, strict=True)], 1).mul_(ctx.scale)
        d_down = (h.T @ rows.to(low.dtype)).to(downs[0].dtype)
        d_ups = [(g_own.T @ own).to(ups[0].dtype) for g_own, own in zip(shares, _parts(low, ups, 1), strict=True)]
        d_downs = d_down.split([len(down) for down in downs])
        d_pairs = [gradient for pair in zip(d_downs, d_ups, strict=True) for gradient in pair]
        if not ctx.needs_input_grad[0]:  # as of cross-attention's keys and values: captions learn nothing
            return None, None, None, None, *d_pairs
        dx = product_backward(g, weight if ctx.frozen is None else ctx.frozen)
        _add_product(dx, h, _one(downs).to(low.dtype))
        return dx.view(ctx.shape).to(ctx.dtype), None, None, None, *d_pairs


def _fast(x: Tensor, frozen: Tensor | FewBitsLinear, bias: Tensor | None, scale: float, *pairs: Tensor) -> Tensor:
    """What `_LoraLinears` gives. Where a base in 16 bits reads little on a CPU, autocast does not come in between: W
    has the precision that it would choose, and for A and B a better one is faster."""
    is_cast = torch.is_autocast_enabled("cpu") and _is_little(x) and frozen.dtype.itemsize == 2
    with torch.autocast("cpu", enabled=False) if is_cast else nullcontext():
        return cast(Tensor, _LoraLinears.apply(x, frozen, bias, scale, *pairs))


def _is_little(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() <= _FEW


def _thin(rows: Tensor, down: Tensor) -> torch.dtype:
    """In which the products with A and B are taken, unless autocast says it: it depends on shapes alone."""
    return down.dtype if _is_little(rows) and not torch.is_autocast_enabled("cpu") else rows.dtype


def _one(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _parts(y: Tensor, ups: Sequence[Tensor], side: int) -> Sequence[Tensor]:
    """Of (rows, all outputs) or (rows, all ranks) the columns of each B (out, rank): `side` is 0 for outputs."""
    return (y,) if len(ups) == 1 else y.split([up.shape[side] for up in ups], 1)


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to y in place."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    else:
        y.add_(a @ b)

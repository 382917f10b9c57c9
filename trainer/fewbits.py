"""A frozen base in few bits: its linear layers keep their weights in 8 or 4 bits, and make them whole for each product.

What trains stays in fp32, and activations are as they were: nothing but the weights is rounded, once, when the base is
loaded (Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314). Convolutions, norms and embeddings stay as
they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .bases import BaseInfo
from .config import RunConfig
from .errors import ConfigError
from .models import Base, load_base
from .startup import import_late, is_installed

FewBits = Literal["int8", "nf4"]
Kinds = Mapping[str, FewBits]
"""By component."""
_ENCODERS = ("text_encoder", "text_encoder_2")
_BLOCK = 64
"""Numbers of a weight that share a scale in nf4 (QLoRA, section 3)."""


class FewBitsLinear(nn.Linear):
    """A frozen linear layer whose weight (out, in) lies in few bits.

    It is an `nn.Linear` to PEFT, which asks it for its sizes, and for `weight` to learn a type and a device.
    """

    def __init__(self, own: nn.Linear, kind: FewBits, device: str | torch.device) -> None:
        """Takes over the bias of `own` and rounds its weight on `device`."""
        nn.Module.__init__(self)  # nn.Linear's own would make a whole weight
        self.in_features, self.out_features = own.in_features, own.out_features
        self.kind: FewBits = kind
        self.dtype = own.weight.dtype
        codes, scales = (_int8 if kind == "int8" else _nf4)(own.weight.detach().to(device))
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = own.bias

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The whole weight (out, in) in the precision of the computation, made anew: to change it changes nothing."""
        return _whole(self.codes, self.scales, self.in_features, self.dtype)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast(Tensor, _Product.apply(x, self))


class _Product(torch.autograd.Function):
    """y = x W^T + b, which keeps no more of W for the backward pass than its few bits: dx = g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FewBitsLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return product(x.to(layer.dtype), layer, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return product_backward(gradients[0].to(ctx.layer.dtype), ctx.layer).to(ctx.dtype), None


def product(x: Tensor, frozen: Tensor | FewBitsLinear, bias: Tensor | None) -> Tensor:
    """x W^T + b of a weight (out, in), or of the layer that keeps it in few bits."""
    if isinstance(frozen, Tensor):
        return linear(x, frozen, bias)
    if not torch.compiler.is_compiling():
        return linear(x, frozen.weight, bias)
    y = _product_as_one(x, frozen.codes, frozen.scales, frozen.in_features, False)
    return y if bias is None else y + bias


def product_backward(g: Tensor, frozen: Tensor | FewBitsLinear) -> Tensor:
    """g W of the same."""
    if isinstance(frozen, Tensor):
        return g @ frozen
    if not torch.compiler.is_compiling():
        return g @ frozen.weight
    return _product_as_one(g, frozen.codes, frozen.scales, frozen.in_features, True)


@torch.library.custom_op("lorasmith::product_in_few_bits", mutates_args=())
def _product_as_one(x: Tensor, codes: Tensor, scales: Tensor, inputs: int, is_backward: bool) -> Tensor:
    """The product with a weight that is made whole, which a compiler does not see: it would make it once for both
    directions, and keep it from one to the other."""
    weight = _whole(codes, scales, inputs, x.dtype)
    return x @ weight if is_backward else linear(x, weight)


@_product_as_one.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, inputs: int, is_backward: bool) -> Tensor:  # noqa: ARG001
    outputs = codes.numel() * (1 if codes.dtype == torch.int8 else 2) // inputs
    return x.new_empty(*x.shape[:-1], inputs if is_backward else outputs)


# ---------------------------------------------------------------------------------------------------------------------
# a base in few bits


def kinds_of(config: RunConfig) -> Kinds:
    """In how many bits a run keeps the linear layers of what a step computes with. Text encoders that are not trained
    have worked before, and rest."""
    kind = config.runtime.base_weights
    if kind == "full":
        return {}
    return dict.fromkeys(("unet", *(_ENCODERS if config.adapter.trains_text else ())), kind)


def kinds_in(base: Base) -> Kinds:
    """In how many bits a live base keeps its linear layers, by component."""
    return {
        name: layer.kind
        for name, module in base.components.items()
        for layer in module.modules()
        if isinstance(layer, FewBitsLinear)
    }


def load_in_few_bits(
    info: BaseInfo,
    kinds: Kinds,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vae_dtype: torch.dtype = torch.float32,
) -> Base:
    """As `load_base`, with the linear layers of some components in few bits. A GPU gets them one by one, and never
    holds all of them whole."""
    if not kinds:
        return load_base(info, dtype, device, vae_dtype)
    base = load_base(info, dtype, vae_dtype=vae_dtype)
    keep_in_few_bits(base, kinds, device)
    base.to(device)
    return base


def keep_in_few_bits(base: Base, kinds: Kinds, device: str | torch.device) -> None:
    """Put layers in few bits, on a device, in the place of linear layers; the rest stays where it is."""
    for name, module in base.components.items():
        for path in list(_paths_of_linears(module)) if name in kinds else ():
            parent, _, leaf = path.rpartition(".")
            holder = module.get_submodule(parent)
            setattr(holder, leaf, FewBitsLinear(getattr(holder, leaf), kinds[name], device))


def _paths_of_linears(module: nn.Module) -> Iterator[str]:
    """Those with an odd number of inputs stay whole: bitsandbytes would compile a kernel for each on a CPU."""
    for path, layer in module.named_modules():
        if type(layer) is nn.Linear and layer.in_features % 2 == 0:
            yield path


def check_nf4(device_type: str) -> None:
    """
    Raises:
        ConfigError: if it is not made on such a device, or what makes it is not installed.
    """
    if device_type not in ("cpu", "cuda"):
        what = f'"nf4" is for NVIDIA GPUs and CPUs, and here {device_type} would train'
        raise ConfigError(what, "runtime.base_weights", 'Set runtime.base_weights = "int8", or "full".')
    if not is_installed("bitsandbytes"):
        raise _missing()


def bitsandbytes() -> Any:
    """The functions of bitsandbytes.

    Raises:
        ConfigError: if it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that nothing here uses
    try:
        return import_late("bitsandbytes.functional")
    except ImportError as error:
        raise _missing() from error


def _missing() -> ConfigError:
    what = '"nf4" is made by bitsandbytes, which is not installed'
    return ConfigError(what, "runtime.base_weights", 'pip install "bitsandbytes>=0.50"')


# ---------------------------------------------------------------------------------------------------------------------
# rounding


def _whole(codes: Tensor, scales: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of which `_int8` or `_nf4` made these."""
    if codes.dtype == torch.int8:
        return codes.to(dtype).mul_(scales)
    shape = torch.Size((2 * codes.numel() // inputs, inputs))
    if codes.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    bits = bitsandbytes()
    state = bits.QuantState(scales, shape, dtype=dtype, blocksize=_BLOCK, quant_type="nf4")
    return bits.dequantize_4bit(codes, state)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to 127 (out, in), and a scale for each output (out, 1) in the weight's own precision.

    The scale is rounded before it is used, so that the numbers make up for it.
    """
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (weight.float() / scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Four-bit NormalFloats, two in a byte (out x in / 2, 1), and a scale in fp32 for each block of 64."""
    if weight.device.type == "meta":
        codes = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        return codes, torch.empty(-(-weight.numel() // _BLOCK), device="meta")
    codes, state = bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=_BLOCK, quant_type="nf4")
    return codes, state.absmax

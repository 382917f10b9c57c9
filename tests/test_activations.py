"""What a UNet keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lorasmith.trainer import activations
from lorasmith.trainer.activations import keep_less
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.models import load_base

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
    "one that halves": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 5)),
    "one of a pixel, without bias": (lambda: nn.Conv2d(8, 12, 1, bias=False), (2, 8, 6, 5)),
    "one of groups": (lambda: nn.Conv2d(8, 12, 3, dilation=2, groups=4), (2, 8, 6, 6)),
    "residual block": (lambda: Timed(in_channels=8, temb_channels=16, groups=4), (2, 8, 6, 5)),
    "one that widens": (lambda: Timed(in_channels=8, out_channels=12, temb_channels=16, groups=4), (2, 8, 6, 5)),
    "one without time": (lambda: Timed(in_channels=8, temb_channels=None, groups=2), (2, 8, 6, 5)),
    "gated unit": (lambda: GEGLU(8, 12), (2, 5, 8)),
}


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "FEW", 0)


class Timed(nn.Module):
    """A residual block at some time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.block, self.width = ResnetBlock2D(**kwargs), kwargs["temb_channels"]

    def forward(self, x: Tensor) -> Tensor:
        time = (
            torch.linspace(-2, 2, x.shape[0] * self.width, dtype=x.dtype).view(x.shape[0], -1) if self.width else None
        )
        return self.block(x, time)


class Kept:
    """The bytes that autograd keeps of what is computed within, each memory once, without those of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.found: dict[int, torch.UntypedStorage] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *of: Any) -> None:
        self.hooks.__exit__(*of)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage
        return tensor

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self.found.values())


def answers(module: nn.Module, x: Tensor, autocast: bool = False) -> tuple[list[Tensor], int]:
    """What it makes of x, the gradient, and the bytes that were kept for it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with Kept(module) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    weight = torch.arange(y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    (y * weight).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad], kept.size


@pytest.mark.parametrize("order", ["usual", "channels last"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "autocast"])
@pytest.mark.parametrize("which", MODULES)
def test_the_same_is_computed_and_less_is_kept(which: str, precision: str, order: str):
    """To the last bit: the operations are PyTorch's own."""
    torch.manual_seed(0)
    make, shape = MODULES[which]
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    module, x = make().to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)
    if order == "channels last" and x.dim() == 4:
        module = cast(Any, module).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    meant, usually = answers(module, x, precision == "autocast")
    assert keep_less(module)
    found, kept = answers(module, x, precision == "autocast")
    for one, other in zip(found, meant, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert kept < usually


@pytest.mark.parametrize("which", MODULES)
def test_what_is_small_is_kept(which: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "FEW", 2**17)
    torch.manual_seed(0)
    make, shape = MODULES[which]
    module, x = make().requires_grad_(False), torch.randn(shape)
    usually = answers(module, x)
    assert keep_less(module)
    torch.testing.assert_close(answers(module, x), usually, rtol=0, atol=0)


def test_a_unet_keeps_half_of_its_activations():
    unet = load_base(inspect_base("pocket")).unet.requires_grad_(False)
    x, text = torch.randn(1, 4, 16, 16).requires_grad_(), torch.randn(1, 77, unet.config["cross_attention_dim"])
    made, kept = [], []
    for _ in range(2):
        with Kept(unet) as found:
            made.append(unet(x, torch.tensor(500), text).sample)
        kept.append(found.size)
        keep_less(unet)
    assert torch.equal(*made)
    assert kept[1] < 0.65 * kept[0]


def test_what_is_trained_keeps_all_that_it_needs():
    """A gated unit alone has no weights of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(
        Timed(in_channels=8, temb_channels=16, groups=4), nn.Conv2d(8, 4, 3), nn.Flatten(2), GEGLU(12, 3)
    )
    x, found = torch.randn(2, 8, 6, 5), []
    for _ in range(2):
        module.zero_grad()
        module(x).square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
        assert keep_less(module) == 1
    assert len(found[0]) == len(list(module.parameters()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", ["norm1", "norm2", "conv1", "conv2"])
def test_a_single_layer_that_is_trained_gets_its_gradient(which: str):
    torch.manual_seed(0)
    module = Timed(in_channels=8, temb_channels=16, groups=4).requires_grad_(False)
    layer, x, found = module.block.get_submodule(which).requires_grad_(True), torch.randn(2, 8, 6, 5), []
    for _ in range(2):
        layer.zero_grad()
        module(x).square().sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
        assert keep_less(module)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
        {"output_scale_factor": 2.0},
        {"skip_time_act": True},
        {"non_linearity": "gelu"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_residual_blocks_of_another_kind_are_left_as_they_are(other: dict[str, Any]):
    block = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, **other).requires_grad_(False)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in block.modules())
    assert keep_less(block) == convolutions
    x, time = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    torch.testing.assert_close(block(x, time), type(block).forward(block, x, time), rtol=0, atol=0)


def test_a_compiler_decides_for_itself_what_a_gated_unit_keeps():
    assert keep_less(GEGLU(8, 12), compiled=True) == 0

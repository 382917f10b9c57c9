"""A base in few bits: what is kept of it, what is learned on it, and that files are as without it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.trainer import device as device_of
from lorasmith.trainer import fewbits
from lorasmith.trainer.adapter import adapter_state, tuner_layers
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.compiled import compiler_told
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.errors import ConfigError, UserError
from lorasmith.trainer.events import Event, Step
from lorasmith.trainer.fastlora import make_compilable, speed_up
from lorasmith.trainer.fewbits import FewBits, FewBitsLinear, load_in_few_bits
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.plan import check_devices, make_plan
from lorasmith.trainer.run import train
from lorasmith.trainer.sample import Drawing, draw

from .conftest import tiny_run

KINDS: list[FewBits] = ["int8", "nf4"]
LOST: dict[str, float] = {"int8": 0.009, "nf4": 0.1}
"""Of a weight's norm, where its numbers are those of a normal distribution. int8: steps of 1 / 127 of a row's largest
number, at most 4 deviations, whose rounding has a root of the mean square of 4 / 127 / sqrt(12) = 0.9 %. nf4: 16
levels, about 9 % (Dettmers et al. 2023)."""
SHARE: dict[str, float] = {"int8": 0.52, "nf4": 0.3}
"""Of what bf16 takes: 8 and 4 bits of 16, and scales: one of 16 bits a row, one of 32 bits for 64 numbers."""


# ---------------------------------------------------------------------------------------------------------------------
# layers


def a_layer(kind: FewBits, dtype: torch.dtype = torch.float32, width: int = 128) -> tuple[nn.Linear, FewBitsLinear]:
    torch.manual_seed(0)
    own = nn.Linear(width, 96).to(dtype).requires_grad_(False)
    own.weight.normal_()
    return own, FewBitsLinear(own, kind, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_in_the_precision_of_the_base(kind: FewBits, dtype: torch.dtype):
    own, few = a_layer(kind, dtype)
    assert (few.weight.dtype, few.weight.shape) == (dtype, own.weight.shape)
    assert (few.weight.float() - own.weight.float()).norm() < LOST[kind] * own.weight.float().norm()
    kept = few.codes.nbytes + few.scales.nbytes
    assert kept < SHARE[kind] * 2 * own.weight.numel()


def test_a_row_of_zeros_and_one_of_tiny_numbers_stay_finite():
    for kind in KINDS:
        own = nn.Linear(64, 3).half().requires_grad_(False)
        own.weight[0], own.weight[1] = 0.0, 1e-7
        few = FewBitsLinear(own, kind, "cpu").weight
        assert few.isfinite().all()
        assert not few[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_rounded_weight_and_keeps_only_few_bits(kind: FewBits):
    _, few = a_layer(kind)
    x, saved = torch.randn(2, 5, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = few(x)
    y.square().sum().backward()
    assert not saved
    assert x.grad is not None
    torch.testing.assert_close(y, x @ few.weight.T + few.bias)
    torch.testing.assert_close(x.grad, 2 * y.detach() @ few.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [True, False], ids=["input learns", "input does not learn"])
def test_a_fast_layer_on_it_is_peft_s(kind: FewBits, asked: bool):
    model = nn.Sequential(a_layer(kind)[1])
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(**settings), model, "default")
    x = torch.randn(2, 5, 128, requires_grad=asked)
    learning = [*([x] if asked else []), *(one for one in model.parameters() if one.requires_grad)]

    def answers() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), learning)]

    meant = answers()
    assert speed_up(model) == 1
    for one, other in zip(answers(), meant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [True, False], ids=["with a LoRA", "alone"])
def test_compiled_it_gives_the_same_and_keeps_no_whole_weight_either(kind: FewBits, adapted: bool):
    """A compiler that saw the weight made whole for both directions would make it once, and keep it."""
    model = nn.Sequential(a_layer(kind)[1])
    if adapted:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}
        inject_adapter_in_model(LoraConfig(**settings), model, "default")
        speed_up(model)
    x = torch.randn(2, 5, 128, requires_grad=True)
    learning = [x, *(one for one in model.parameters() if one.requires_grad)]

    def answers(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = call(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), learning)]

    meant, saved = answers(model), list[Tensor]()
    make_compilable(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # which divides a graph as inductor does
    watched = torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one)
    with watched, compiler_told("here"):
        found = answers(compiled)
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert not [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel() >= 96 * 128]


def test_its_weight_cannot_be_put_in_its_place():
    _, few = a_layer("int8")
    with pytest.raises((KeyError, AttributeError)):
        setattr(few, "weight", nn.Parameter(torch.zeros(96, 128)))  # noqa: B010


# ---------------------------------------------------------------------------------------------------------------------
# a base


def linear_bytes(base: Base) -> int:
    """Of the UNet's linear layers, all that is kept of their weights."""
    layers = [layer for layer in base.unet.modules() if isinstance(layer, nn.Linear)]
    own = [(layer.codes, layer.scales) if isinstance(layer, FewBitsLinear) else (layer.weight,) for layer in layers]
    return sum(tensor.nbytes for tensors in own for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_keeps_a_half_and_a_quarter_of_bf16_and_nothing_whole_beside(
    kind: FewBits, monkeypatch: pytest.MonkeyPatch
):
    info, whole = inspect_base("pocket"), []

    def watched(*given: Any) -> Base:
        base = load_base(*given[:2])
        whole.extend(weakref.ref(layer.weight) for layer in base.unet.modules() if isinstance(layer, nn.Linear))
        return base

    meant = linear_bytes(load_base(info, torch.bfloat16))
    monkeypatch.setattr(fewbits, "load_base", lambda info, dtype, **_: watched(info, dtype))
    found = load_in_few_bits(info, {"unet": kind}, torch.bfloat16)
    gc.collect()
    assert whole
    assert [one for one in whole if one() is not None] == []
    assert linear_bytes(found) / meant < SHARE[kind]
    floats = [one for one in found.unet.parameters() if one.dim() == 2 and one.is_floating_point()]
    assert sum(one.numel() for one in floats) < 0.02 * meant  # scales, and no weight


def test_a_picture_is_nearly_the_same():
    """On the pocket base, without an adapter. 8 bits are not to be seen; 4 bits change some pixels."""
    info, drawing = inspect_base("pocket"), Drawing("", seed=1, steps=8, guidance=3.0, size=64)
    usual = picture(load_base(info), drawing)
    mosts: list[tuple[FewBits, float]] = [("int8", 0.01), ("nf4", 0.08)]
    for kind, most in mosts:
        difference = (picture(load_in_few_bits(info, {"unet": kind}), drawing) - usual).abs().mean()
        assert 0 < difference < most, kind


def picture(base: Base, drawing: Drawing) -> Tensor:
    """(height, width, 3), in 0 to 1."""
    import numpy

    [drawn] = draw(base, ["emoji of red heart"], drawing)
    return torch.from_numpy(numpy.asarray(drawn).copy()).float() / 255


# ---------------------------------------------------------------------------------------------------------------------
# runs


def run(config: RunConfig) -> tuple[list[float], Trainer]:
    events: list[Event] = []
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer.train(lambda: False)
    return [event.loss for event in events if isinstance(event, Step)], trainer


@pytest.fixture
def short(tmp_path: Path) -> Callable[..., RunConfig]:
    """A function that gives a run of three steps on a tiny base."""
    values = tiny_run(tmp_path) | {"runs": str(tmp_path / "runs")}

    def make(name: str, adapter: dict[str, Any] | None = None, sample: Any = None, **runtime: Any) -> RunConfig:
        over = {"name": name, "adapter": adapter or {}, "runtime": runtime, "sample": sample or {}}
        return validate(merge(values, over))

    return make


def test_losses_and_changes_are_nearly_those_on_the_full_base(short: Callable[..., RunConfig]):
    """The same seed draws the same noise, so a loss differs by what the prediction does: by less than 1 % of a weight
    in 8 bits, by 9 % in 4, most of which evens out over the inputs of a layer."""
    losses, full = run(short("full"))
    meant = adapter_state(full.base)
    for kind, most in (("int8", 0.005), ("nf4", 0.1)):
        found, trainer = run(short(kind, base_weights=kind))
        assert found == pytest.approx(losses, rel=most), kind
        assert found != losses
        changed = adapter_state(trainer.base)
        assert {name: one.shape for name, one in changed.items()} == {name: one.shape for name, one in meant.items()}
        assert all(one.dtype == torch.float32 for one in trainer.trained)
        layers = [layer for module in trainer.base.components.values() for _, layer in tuner_layers(module)]
        assert all(isinstance(layer.base_layer, FewBitsLinear) for layer in layers)  # pyright: ignore


@pytest.mark.parametrize(
    ("adapter", "runtime"),
    [
        ({"kind": "loha"}, {}),
        ({"init": "eva"}, {}),
        ({"dropout": 0.1, "targets": "all"}, {"precision": "bf16"}),
        ({}, {"precision": "bf16", "gradient_checkpointing": True}),
        ({}, {"fast_lora": False, "cpu_kernels": False}),
    ],
    ids=["loha", "eva", "dropout", "lean", "plain"],
)
def test_other_adapters_and_techniques_go_with_it(
    short: Callable[..., RunConfig], adapter: dict[str, Any], runtime: dict[str, Any]
):
    usual, _ = run(short("full", adapter, **runtime))
    found, _ = run(short("few", adapter, **runtime, base_weights="int8"))
    assert found == pytest.approx(usual, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_draws_and_its_verified_file_is_one_for_the_full_base(kind: FewBits, short: Callable[..., RunConfig]):
    def file_of(name: str, base_weights: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        sample = {"every": 3, "prompts": ["thing"], "steps": 2}
        exports = train(make_plan(short(name, sample=sample, base_weights=base_weights)), lambda event: None).exports
        return next(path for path in exports if path.name == f"{name}.safetensors")

    path = file_of("few", kind)
    few, full = load_file(path), load_file(file_of("full", "full"))
    assert {key: one.shape for key, one in few.items()} == {key: one.shape for key, one in full.items()}
    base = load_base(inspect_base(short("few").base.model))
    base.pipeline().load_lora_weights(str(path))
    layers = [layer for module in base.components.values() for layer in tuner_layers(module)]
    assert len(layers) == sum(key.endswith(".alpha") for key in few)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"kind": "full", "rank": 16, "alpha": 16.0}, "they are what is trained"),
        ({"kind": "dora"}, 'adapter.kind is "dora"'),
        ({"kind": "oft", "rank": 16, "alpha": 16.0, "block_size": 4}, 'adapter.kind is "oft"'),
        ({"init": "pissa"}, 'adapter.init is "pissa"'),
    ],
)
def test_what_needs_whole_weights_is_one_error(short: Callable[..., RunConfig], adapter: dict[str, Any], reason: str):
    with pytest.raises(ConfigError) as caught:
        short("few", adapter, base_weights="int8")
    [problem] = caught.value.problems
    assert problem.where.endswith("runtime.base_weights")
    assert reason in problem.what


def test_nf4_without_bitsandbytes_is_one_error_before_anything_begins(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fewbits, "is_installed", lambda library: library != "bitsandbytes")
    with pytest.raises(UserError, match=r'bitsandbytes, which is not installed.*pip install "bitsandbytes'):
        make_plan(short("few", base_weights="nf4"))
    make_plan(short("few", base_weights="int8"))


def test_a_bitsandbytes_that_does_not_import_is_the_same_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match="which is not installed"):
        a_layer("nf4")


def test_nf4_is_refused_where_nothing_computes_it(short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_of, "kind_here", lambda: "mps")
    with pytest.raises(ConfigError, match=r'here mps would train.*base_weights = "int8"'):
        check_devices(short("few", base_weights="nf4"))
    check_devices(short("few", base_weights="int8"))

"""What makes training faster changes no result: each technique on and off, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lorasmith.trainer import activations, cpukernels, device
from lorasmith.trainer.adapter import adapter_state, strength, tuner_layers
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.cpukernels import _as_product, _can_be_kept_twice, _InItsOrder, _level, attend, speed_up_on_cpu
from lorasmith.trainer.device import has_bf16_on_cpu
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.events import Event, Step, Warned
from lorasmith.trainer.fastlora import Together, speed_up
from lorasmith.trainer.flat import Flat
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import load_base
from lorasmith.trainer.plan import check_devices, make_plan

State = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# fast layers


class Two(nn.Module):
    """Two linear layers, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 30), nn.Linear(30, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def adapted(dtype: torch.dtype, **options: Any) -> Two:
    torch.manual_seed(0)
    model = Two().to(dtype).requires_grad_(False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"], "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(**settings | options), model, "default")
    return model


def answers(model: Two, x: Tensor) -> list[Tensor]:
    """The output, and all gradients of the sum of its squares."""
    given = x.requires_grad_(x.requires_grad)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for leaf in [given, *learning]:
        leaf.grad = None
    y = model(given)
    y.square().sum().backward()
    return [y.detach(), *[leaf.grad for leaf in [given, *learning] if leaf.grad is not None]]


@pytest.mark.parametrize("shape", [(7, 20), (2, 5, 20)])
@pytest.mark.parametrize("asked", [True, False], ids=["input learns", "input does not learn"])
def test_a_fast_layer_is_peft_s_in_double_precision(shape: tuple[int, ...], asked: bool):
    model, x = adapted(torch.float64), torch.randn(shape, dtype=torch.float64).requires_grad_(asked)
    meant = answers(model, x)
    assert speed_up(model) == 2
    found = answers(model, x)
    assert len(found) == len(meant) == 5 + asked
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_fast_layer_keeps_its_input_and_the_projection_only():
    model, kept = adapted(torch.float32), []
    speed_up(model)
    x = torch.randn(6, 20)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.a(x)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert sorted(tensor.numel() for tensor in kept if tensor.data_ptr() not in own) == [6 * 4, 6 * 20]


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True, "target_modules": ["a"]}]
)
def test_other_layers_go_peft_s_way(options: dict[str, Any]):
    assert speed_up(adapted(torch.float32, **options)) == 0


def test_a_layer_that_is_switched_off_or_merged_goes_peft_s_way():
    model, x = adapted(torch.float32), torch.randn(3, 20)
    speed_up(model)
    fast, layers = model(x), [layer for _, layer in tuner_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    assert (model(x) - fast).abs().max() > 0.1
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(model(x), fast)


def test_peft_saves_and_loads_what_was_trained_the_fast_way():
    model, other = adapted(torch.float32), adapted(torch.float32)
    for parameter in other.parameters():
        parameter.data.zero_()
    speed_up(model)
    with torch.no_grad():
        [parameter.add_(1) for parameter in model.parameters() if parameter.requires_grad]
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name}, False)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    x = torch.randn(3, 20)
    torch.testing.assert_close(model(x), other(x))


# ---------------------------------------------------------------------------------------------------------------------
# what a CPU computes otherwise


@pytest.mark.parametrize("size", [(8, 8), (1, 5), (4, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolution_as_a_product_is_the_convolution(size: tuple[int, int], has_bias: bool):
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    convolution = nn.Conv2d(12, 20, 3, padding=1, bias=has_bias).double().requires_grad_(False)
    answers = []
    for _ in range(2):
        x.grad = None
        y = convolution(x)
        (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum().backward()
        answers.append((y.detach(), x.grad))
        _as_product(convolution)
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.skipif(not has_bf16_on_cpu(), reason="needs a processor with instructions for bf16")
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("sizes", [((8, 8), (4, 7)), ((1, 5), (20, 20)), ((24, 24), (25, 25))])
def test_a_convolution_in_onednn_s_order_is_the_convolution(side: int, sizes: Sequence[tuple[int, int]]):
    """At each of two sizes in turn, forward and backward."""
    convolution = nn.Conv2d(12, 20, side, padding=side // 2).bfloat16().requires_grad_(False)
    assert _can_be_kept_twice("conv", convolution)
    ordered = _InItsOrder(convolution)
    for size in (*sizes, *sizes):
        x = torch.randn(2, 12, *size, dtype=torch.bfloat16, requires_grad=True)
        answers = []
        for convolve in (convolution, ordered):
            x.grad = None
            y = convolve(x)
            assert y.is_contiguous()
            (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum().backward()
            answers.append((y.detach(), x.grad))
        for one, other in zip(*answers, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not has_bf16_on_cpu(), reason="needs a processor with instructions for bf16")
def test_a_weight_is_in_the_order_for_each_size_of_its_input(monkeypatch: pytest.MonkeyPatch):
    """In that for another one a convolution of these channels takes a hundred times as long on some processors. The
    orders of the last sizes are kept, in both directions."""
    monkeypatch.setattr(cpukernels, "ORDERS_KEPT", 2)
    convolution = nn.Conv2d(24, 12, 3, padding=1).bfloat16().requires_grad_(False)
    ordered, made = _InItsOrder(convolution), list[tuple[tuple[int, ...], bool]]()
    write = ordered._ordered
    monkeypatch.setattr(_InItsOrder, "_ordered", lambda _, *key: made.append((tuple(key[0]), key[1])) or write(*key))
    ordered = _InItsOrder(convolution)
    for size in (8, 4, 8, 4, 6, 8, 30):
        x = torch.randn(2, 24, size, size, dtype=torch.bfloat16, requires_grad=True)
        ordered(x).sum().backward()
    kept = [((2, 24, size, size), (2, 12, size, size)) for size in (8, 4, 6, 8)]
    assert made == [told for forward, backward in kept for told in ((forward, True), (backward, False))]


def test_layers_that_read_the_same_are_one_function():
    """As each alone in double precision, and also once their weights no more lie side by side, or one is off."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(20, 30, bias=False) for name in "qkv"}).double().requires_grad_(False)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=list("qkv"), init_lora_weights=False)
    inject_adapter_in_model(lora, cast(Any, model), "default")
    layers: list[Any] = list(model.values())
    speed_up(model)
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)

    def answers(outputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        return [*outputs, *torch.autograd.grad(torch.cat(list(outputs)).square().sum(), leaves, allow_unused=True)]

    together = Together(layers)
    for spoil in (lambda: None, lambda: moved(layers[1].base_layer), lambda: layers[2].enable_adapters(False)):
        spoil()
        for one, other in zip(answers(together(x)), answers([layer(x) for layer in layers]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def moved(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + 1


def test_a_larger_picture_goes_the_usual_way():
    convolution = nn.Conv2d(12, 20, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 12, 20, 20)
    meant = convolution(x)
    _as_product(convolution)
    torch.testing.assert_close(convolution(x), meant)


@pytest.mark.parametrize("tokens", [(8, 77), (64, 77), (1025, 1024)])
def test_attention_is_attention(tokens: tuple[int, int]):
    query, key, value = (torch.randn(1, 2, count, 8, dtype=torch.float64) for count in (*tokens, tokens[1]))
    meant = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value), meant, rtol=0, atol=1e-12)


def test_convolutions_over_few_pixels_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpukernels, "MOST_KEPT_TWICE", 0)
    unet = load_base(inspect_base("pocket")).unet
    sides = {name: 16 // 2 ** _level(unet, name) for name, _ in unet.named_modules() if name.endswith(".conv1")}
    seen: dict[str, int] = {}
    for name in sides:
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given[0].shape[-1]})
        )
    with torch.no_grad():
        unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 77, unet.config["cross_attention_dim"]))
    assert seen == sides
    speed_up_on_cpu(unet, 16 * 16)
    fast = {name for name in sides if "forward" in vars(unet.get_submodule(name))}
    assert fast == {name for name, side in sides.items() if side <= 8} != set()


# ---------------------------------------------------------------------------------------------------------------------
# matrices side by side


def test_the_optimizer_tells_the_same_of_matrices_side_by_side():
    states = []
    for is_flat in (True, False):
        torch.manual_seed(0)
        one, two, three = (nn.Parameter(torch.randn(size)) for size in [(3, 4), (5,), (2, 2)])
        groups: list[dict[str, Any]] = [{"params": [one, two], "lr": 1e-2}, {"params": [three], "lr": 1e-3}]
        flat = Flat(groups) if is_flat else None
        optimizer = torch.optim.AdamW(groups, fused=True)
        for number in range(3):
            total = sum(((number + parameter).square().sum() for parameter in (one, two, three)), torch.zeros(()))
            total.backward()
            optimizer.step()
            flat.zero_grad() if flat else optimizer.zero_grad()
        if flat:
            assert three.grad is not None
            assert not three.grad.any()
            told = flat.state_dict(optimizer)
            optimizer.load_state_dict(flat.side_by_side(told) or {})
            torch.testing.assert_close(flat.state_dict(optimizer), told, rtol=0, atol=0)
            assert flat.side_by_side({"param_groups": [{"params": [0, 1, 2]}], "state": {}}) is None
        states.append((flat.state_dict(optimizer) if flat else optimizer.state_dict(), [one, two, three]))
    torch.testing.assert_close(*states)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def trained(config: RunConfig) -> tuple[list[float], State, Trainer]:
    """The losses of a run, what it trained, and its trainer."""
    events: list[Event] = []
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision may be another
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer.train(lambda: False)
    return [event.loss for event in events if isinstance(event, Step)], adapter_state(trainer.base), trainer


TECHNIQUES = {
    "fast_lora": False,
    "cpu_kernels": False,
    "flat_optimizer": False,
    "lean_activations": False,
    "channels_last": True,
    "gradient_checkpointing": True,
}


@pytest.fixture
def short(short_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(name: str, **runtime: Any) -> RunConfig:
        cache = short_run().runtime.cache
        return short_run(name=name, runtime={"precision": "fp32", "cache": cache} | runtime)

    return make


def test_losses_and_weights_are_the_same_with_and_without_each_technique(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activations, "FEW", 0)
    monkeypatch.setattr("lorasmith.trainer.plan._check_order", lambda: None)  # channels_last is for GPUs
    losses, weights, _ = trained(short("plain"))
    for technique, other in TECHNIQUES.items():
        found, changed, _ = trained(short(technique, **{technique: other}))
        assert found == pytest.approx(losses, rel=1e-4), technique
        for name, weight in weights.items():
            torch.testing.assert_close(changed[name], weight, rtol=0, atol=2e-4, msg=f"{technique}: {name}")


def test_a_cpu_refuses_what_takes_the_place_of_something_faster(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device, "kind_here", lambda: "cpu")
    with pytest.raises(ConfigError, match=r"runtime\.channels_last: may pay on a GPU"):
        check_devices(short("last", channels_last=True))
    monkeypatch.setattr(device, "kind_here", lambda: "cuda")
    check_devices(short("last", channels_last=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_as_cuda_graphs_learn_what_steps_one_by_one_learn(short: Callable[..., RunConfig], precision: str):
    """A GPU adds up in any order, so that numbers are alike and no more; with CPUs tests/test_stepgraph.py is exact."""
    losses, weights, _ = trained(short("plain", precision=precision))
    found, changed, trainer = trained(short("graphs", precision=precision, cuda_graphs=True))
    assert trainer.graphs is not None
    assert all(trainer.graphs.steps.values())
    assert found == pytest.approx(losses, rel=1e-4 if precision == "fp32" else 2e-2)
    for name, weight in weights.items():
        torch.testing.assert_close(changed[name], weight, rtol=0, atol=2e-4 if precision == "fp32" else 2e-3)


def test_bf16_without_autocast_is_as_near_to_fp32_as_with_it(short_run: Callable[..., RunConfig]):
    exact, _, _ = trained(short_run(name="fp32"))
    lean, _, trainer = trained(short_run(name="lean", runtime={"precision": "bf16"}))
    cast, _, with_autocast = trained(short_run(name="cast", runtime={"precision": "bf16", "autocast": True}))
    assert (trainer.denoiser.autocast, with_autocast.denoiser.autocast) == (False, True)
    assert lean == pytest.approx(exact, rel=0.02)
    assert cast == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("over", [{"adapter": {"new_tokens": 1}}, {"adapter": {"dropout": 0.1}}])
def test_what_is_no_fast_layer_is_autocast(short_run: Callable[..., RunConfig], over: dict[str, Any]):
    assert trained(short_run(**over, runtime={"precision": "bf16"}))[2].denoiser.autocast


def test_strengths_act_on_fast_layers(short: Callable[..., RunConfig]):
    base = trained(short("fast"))[2].base
    layer: Any = next(layer for _, layer in tuner_layers(base.unet))
    x = torch.randn(1, 3, layer.in_features)
    with strength(base, 0.0):
        none = layer(x)
    with strength(base, 0.5):
        half = layer(x)
    torch.testing.assert_close(none, layer.base_layer(x))
    torch.testing.assert_close(half - none, (layer(x) - none) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_run_goes_on_with_matrices_laid_otherwise(short: Callable[..., RunConfig], before: bool, after: bool):
    _, _, trainer = trained(short("first", flat_optimizer=before))
    checkpoint = load_checkpoint(trainer.run.checkpoint(trainer.state.step))
    plan, told = make_plan(short("second", flat_optimizer=after)), []
    again = Trainer(plan, create_run(plan.config), told.append, checkpoint)
    assert not [event for event in told if isinstance(event, Warned)]
    shots = next(iter(plan.order.steps(2)))
    for one in (trainer, again):
        one.train_step(shots)
    found, meant = adapter_state(again.base), adapter_state(trainer.base)
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "over"),
    [
        ("fast_lora", {"adapter": {"kind": "dora"}, "runtime": {"fast_lora": False}}),
        ("autocast", {"adapter": {"kind": "dora"}, "runtime": {"autocast": True}}),
        ("autocast", {"runtime": {"autocast": True, "precision": "fp32"}}),
        ("flat_optimizer", {"optimizer": {"kind": "lion"}, "runtime": {"flat_optimizer": False}}),
    ],
)
def test_a_switch_without_effect_is_an_error(short_run: Callable[..., RunConfig], setting: str, over: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"runtime.{setting}: has no effect"):
        short_run(**over)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_on_a_processor_without_instructions_for_it_is_a_warning(
    short_run: Callable[..., RunConfig], has_instructions: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device, "kind_here", lambda: "cpu")
    monkeypatch.setattr(device, "has_bf16_on_cpu", lambda: has_instructions)
    for precision, tells in (("bf16", not has_instructions), ("fp32", False)):
        told = [what for what in make_plan(short_run(runtime={"precision": precision})).warnings() if "bf16" in what]
        assert bool(told) is tells
        assert all('Set it to "auto" or "fp32"' in what for what in told)

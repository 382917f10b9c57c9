"""The kernel of attention that is taken for a shape is the fastest of those that give the same result, and is told."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorasmith.trainer import attention, run
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.attention import (
    KERNELS,
    TOLERANCE,
    USUAL,
    Chosen,
    Kernel,
    Kernels,
    Shape,
    attend_by,
    choose,
    fastest,
    kernel_named,
    refuse_unfit,
    shapes_of,
    timer_on,
)
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import write_config
from lorasmith.trainer.console import attention_sentence
from lorasmith.trainer.errors import ConfigError, UserError
from lorasmith.trainer.events import AttentionChosen, Event, Phase, Step
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import load_base
from lorasmith.trainer.plan import make_plan

from . import tiny

CPU = torch.device("cpu")
SHORT = Shape(2, 3, 16, 20, 8, torch.float32)
SDPA: Any = scaled_dot_product_attention


# ---------------------------------------------------------------------------------------------------------------------
# the choice


class Clock:
    """Time that passes only while a kernel of it computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def kernel(self, name: str, *seconds: float, result: Any = SDPA, **more: Any) -> Kernel:
        """One that takes these times, one after the other and over again."""
        calls = iter(seconds * 100)

        def attend(*given: Tensor) -> Tensor:
            self.now += next(calls)
            return result(*given)

        return Kernel(name, attend, **more)

    def time(self, work: Callable[[], object]) -> float:
        before = self.now
        work()
        return self.now - before


def chosen(clock: Clock, kernels: Sequence[Kernel], shape: Shape = SHORT) -> Chosen:
    return fastest(kernels, shape, CPU, clock.time)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ((4.0, 3.0, 2.0), "c"),
        ((4.0, 1.0, 2.0), "b"),
        ((1.0, 3.0, 2.0), USUAL),
        ((4.0, 3.9, 4.5), USUAL),  # not worth it
        ((4.0, 3.8, 4.5), "b"),
    ],
)
def test_the_fastest_is_taken_if_it_is_worth_it(times: tuple[float, ...], taken: str):
    clock = Clock()
    found = chosen(clock, [clock.kernel(name, each) for name, each in zip((USUAL, "b", "c"), times, strict=True)])
    assert found.kernel == taken
    assert found.milliseconds == dict(zip((USUAL, "b", "c"), times, strict=True))
    assert found.left_out == {}


def test_a_pass_that_is_slow_by_chance_decides_nothing():
    clock = Clock()
    once_in_a_while = clock.kernel("b", 2.0, 2.0, 2.0, 90.0)
    assert chosen(clock, [clock.kernel(USUAL, 4.0), once_in_a_while]).kernel == "b"


def test_a_hopeless_kernel_is_timed_twice_alone():
    clock = Clock()
    chosen(clock, [clock.kernel(USUAL, 1.0), clock.kernel("b", 100.0)])
    assert clock.now == (1 + 2 + 5) * 1.0 + (1 + 2 + 2) * 100.0  # compared, warmed up, timed


def fails(*given: Tensor) -> Tensor:
    raise RuntimeError("no kernel for heads of 8.\nmore about it")


def is_away(*given: Tensor) -> Tensor:
    return 1.05 * SDPA(*given)


def has_other_gradients(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return SDPA(query, 2 * key - key.detach(), value)


def is_no_number(*given: Tensor) -> Tensor:
    return SDPA(*given) * torch.nan


def is_wrong_in_the_last_head(*given: Tensor) -> Tensor:
    seen = SDPA(*given)
    return torch.cat([seen[:, :-1], 2 * seen[:, -1:]], 1)


def fails_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value.detach())


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (fails, "no kernel for heads of 8"),
        (is_away, "its result is 5.00% away from that of math"),
        (has_other_gradients, "its result is 100.00% away from that of math"),
        (is_no_number, "its result is nan% away from that of math"),
        (is_wrong_in_the_last_head, "its result is "),
        (fails_backward, "The differentiated Tensor at index 2 appears to not have been used in the graph"),
    ],
)
def test_what_fails_or_gives_another_result_is_left_out(result: Any, why: str):
    clock = Clock()
    found = chosen(clock, [clock.kernel(USUAL, 4.0), clock.kernel("b", 1.0, result=result), clock.kernel("c", 3.0)])
    assert found.kernel == "c"
    assert set(found.milliseconds) == {USUAL, "c"}
    assert found.left_out["b"].startswith(why)


def test_what_would_keep_too_much_is_left_out_of_long_sequences_alone():
    clock = Clock()
    kernels = [clock.kernel(USUAL, 4.0), clock.kernel("b", 1.0, keeps_pairs=True)]
    long = chosen(clock, kernels, Shape(1, 2, 256, 256, 8, torch.bfloat16))
    assert long.left_out == {"b": "it keeps a number for each pair of a query and a key, 0.2 MiB"}
    assert chosen(clock, kernels, Shape(1, 2, 8, 8, 32, torch.bfloat16)).kernel == "b"


def test_the_usual_kernel_stands_if_none_can_be_told():
    clock = Clock()
    found = chosen(clock, [clock.kernel(USUAL, 1.0, result=fails), clock.kernel("b", 1.0, result=fails)])
    assert (found.kernel, set(found.left_out)) == (USUAL, {USUAL, "b"})


def test_the_usual_kernel_stands_where_the_probe_itself_finds_no_memory(monkeypatch: pytest.MonkeyPatch):
    def full(self: Any, tokens: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(attention._Trial, "_random", full)
    found = fastest(KERNELS, SHORT, CPU, timer_on(CPU))
    assert (found.kernel, found.milliseconds) == ("sdpa", {})
    assert "out of memory" in found.left_out["flash"]


def test_reasons_that_libraries_give_elsewhere_are_told():
    def as_pytorch(*given: Tensor) -> Tensor:
        warnings.warn("Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)", stacklevel=1)
        warnings.warn("Memory Efficient attention has been runtime disabled. (Triggered internally at x)", stacklevel=1)
        warnings.warn("Flash attention kernel not used because: (Triggered internally at x.cpp:2.)", stacklevel=1)
        warnings.warn("Expected heads of at most 256. Got 320 (Triggered internally at x.cpp:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def as_xformers(*given: Tensor) -> Tensor:
        inputs = "     query       : shape=(1, 2, 1, 40) (torch.float32)\n     p           : 0.0\n"
        reasons = "`fa2F` is not supported because:\n    dtype=torch.float32\n    operator wasn't built\n"
        again = "`cutlassF` is not supported because:\n    operator wasn't built"
        raise NotImplementedError(f"No operator found for `forward` with inputs:\n{inputs}{reasons}{again}")

    clock = Clock()
    kernels = [clock.kernel(USUAL, 1.0), clock.kernel("b", 1.0, result=as_pytorch)]
    found = chosen(clock, [*kernels, clock.kernel("c", 1.0, result=as_xformers)])
    assert found.left_out == {
        "b": "Expected heads of at most 256. Got 320",
        "c": "dtype=torch.float32; operator wasn't built",
    }


# ---------------------------------------------------------------------------------------------------------------------
# kernels that are here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(64, 77), (8, 8)], ids=["cross", "few"])
def test_a_probe_of_what_is_here_takes_something_that_gives_the_result(tokens: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    shape = Shape(2, 4, *tokens, 40, dtype)
    found = fastest(KERNELS, shape, CPU, timer_on(CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert {USUAL, "flash"} <= set(found.milliseconds) <= {USUAL, "flash", "math"}
    assert {"cudnn", "efficient", "xformers"} <= set(found.left_out)
    assert ("math" in found.left_out) == (tokens == (64, 77))
    assert all(each > 0 for each in found.milliseconds.values())
    assert found.kernel in found.milliseconds

    query, key, value = (torch.randn(2, 4, count, 40, dtype=dtype) for count in (*tokens, tokens[1]))
    kernels = Kernels(fails)
    kernels.take([found])
    exact = kernel_named("math").attend(query.float(), key.float(), value.float())
    assert (kernels(query, key, value) - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_what_is_known_is_not_probed_again():
    def never(work: Callable[[], object]) -> float:
        raise AssertionError("was timed")

    shapes = [SHORT, SHORT._replace(batch=1)]
    known = {SHORT.words: "flash", shapes[1].words: "a kernel of another version"}
    assert next(choose(shapes, known, CPU, never)) == Chosen(SHORT, "flash")
    clock = Clock()
    assert list(choose(shapes, known, CPU, clock.time))[1].milliseconds


def test_a_shape_has_words_of_its_own():
    others = [SHORT, *(SHORT._replace(**{name: 99}) for name in ("batch", "heads", "queries", "keys", "width"))]
    assert len({one.words for one in [*others, SHORT._replace(dtype=torch.float16)]}) == 7
    assert SHORT.words == "2 x 3 heads of 8, 16 x 20, float32"


# ---------------------------------------------------------------------------------------------------------------------
# a UNet that computes so


@pytest.fixture(scope="module", params=["pocket", *tiny.MAKERS])
def unet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = request.param
    if base in tiny.MAKERS:
        base = str(tiny.MAKERS[base](tmp_path_factory.mktemp("bases") / base, layers_per_block=1))
    return load_base(inspect_base(base)).unet


def asked(unet: Any, height: int, width: int, tokens: int) -> Tensor:
    """A prediction of two pictures of a UNet."""
    torch.manual_seed(0)
    text = torch.randn(2, tokens, unet.config["cross_attention_dim"])
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.zeros(2, 6)}  # which only SDXL reads
    with torch.no_grad():
        return unet(torch.randn(2, 4, height, width), 1, text, added_cond_kwargs=added).sample


def test_the_shapes_of_a_unet_are_those_that_it_computes(unet: Any):
    usual, seen = dict(unet.attn_processors), list[Shape]()

    def spy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(Shape.of(query, key))
        return scaled_dot_product_attention(query, key, value)

    meant = asked(unet, 14, 9, 154)
    attend_by(unet, spy)
    assert torch.equal(asked(unet, 14, 9, 154), meant)
    assert len(seen) == len(usual)  # all of its attention is plain
    assert shapes_of(unet, [(2, (9, 14))], [154], torch.float32) == sorted(set(seen), key=lambda shape: shape[:-1])
    unet.set_attn_processor(usual)


def test_a_unet_computes_each_shape_by_its_kernel_and_others_as_usual():
    unet, taken = load_base(inspect_base("pocket")).unet, list[str]()

    def kernel(name: str) -> Any:
        return lambda *given: taken.append(name) or SDPA(*given)

    kernels = Kernels(kernel("usual"))
    attend_by(unet, kernels)
    first, *others = shapes_of(unet, [(2, (8, 8))], [77], torch.float32)
    kernels.by_shape = {first: kernel("first")}
    asked(unet, 8, 8, 77)
    both = {name: taken.count(name) for name in ("first", "usual")}
    assert min(both.values()) > 0
    assert sum(both.values()) == len(unet.attn_processors)
    taken.clear()
    asked(unet, 12, 8, 77)  # a picture of another shape
    assert set(taken) == {"usual"}
    assert len(others) == 3


def test_under_autocast_the_kernel_is_that_of_the_precision_computed_in():
    kernels = Kernels(fails)
    kernels.by_shape = {SHORT._replace(dtype=torch.bfloat16): SDPA}
    query, key = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels(query, key, key).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# a run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CPU were a card on which kernels are tried."""
    monkeypatch.setattr(attention, "PROBED_ON", ("cpu",))


@pytest.fixture
def short(short_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(name: str, base: Mapping[str, str] = MappingProxyType({}), **runtime: Any) -> RunConfig:
        cache = short_run().runtime.cache
        usual = {"precision": "fp32", "cache": cache, "cpu_kernels": False}
        return short_run(name=name, base=dict(base), budget={"images": 8}, runtime=usual | runtime)

    return make


def trained(config: RunConfig, checkpoint: Path | None = None) -> tuple[list[float], Trainer, list[Event]]:
    """The losses of a run, its trainer, and what was told."""
    events: list[Event] = []
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append, load_checkpoint(checkpoint) if checkpoint else None)
    trainer.train(lambda: False)
    return [event.loss for event in events if isinstance(event, Step)], trainer, events


def told(events: list[Event]) -> list[AttentionChosen]:
    return [event for event in events if isinstance(event, AttentionChosen)]


@pytest.mark.usefixtures("here")
def test_a_probe_changes_no_bit_of_what_is_trained(short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    losses, usual, events = trained(short("usual", attention="sdpa"))
    assert told(events) == []
    monkeypatch.setattr(attention, "_WORTH", 0.0)  # so that all are tried, and none is taken
    found, probed, events = trained(short("probed", attention="auto"))
    [chosen] = told(events)
    assert {shape["kernel"] for shape in chosen.shapes} == {USUAL}
    assert all("flash" in shape["milliseconds"] for shape in chosen.shapes)
    assert found == losses
    weights = adapter_state(usual.base)
    assert all(torch.equal(weight, weights[name]) for name, weight in adapter_state(probed.base).items())


def test_on_a_cpu_nothing_is_probed(short: Callable[..., RunConfig]):
    assert told(trained(short("usual", attention="auto"))[2]) == []


@pytest.mark.usefixtures("here")
def test_each_shape_that_is_trained_is_chosen_before_the_first_step_and_told_once(short: Callable[..., RunConfig]):
    _, trainer, events = trained(short("probed"))
    [chosen] = told(events)
    kinds = [event.type for event in events if not (isinstance(event, Phase) and event.name != "probing attention")]
    assert kinds.index("attention") < kinds.index("step")
    assert kinds[kinds.index("attention") - 1] == "phase"
    assert trainer.kernels is not None
    assert {shape["shape"] for shape in chosen.shapes} == {shape.words for shape in trainer.kernels.by_shape}

    seen = set[Shape]()
    trainer.kernels.usual = lambda query, key, value: seen.add(Shape.of(query, key)) or fails()
    trainer.train_step(next(iter(trainer.plan.order.steps(2))))  # every shape is known
    assert seen == set()
    sentence = attention_sentence(chosen)
    assert sentence.startswith(f"attention on cpu, PyTorch {torch.__version__}: ")
    assert sentence.endswith(f" of {len(chosen.shapes)} shapes, the fastest by a probe")


@pytest.mark.usefixtures("here")
def test_a_run_that_goes_on_takes_what_it_took_before(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def slowest(kernels: Sequence[Kernel], shape: Shape, *others: Any) -> Chosen:
        return Chosen(shape, "flash", {"flash": 1.0})

    with monkeypatch.context() as patch:
        patch.setattr(attention, "fastest", slowest)
        _, first, events = trained(short("first"))
    [before] = told(events)
    folder = first.run.checkpoint(first.state.step)
    kept = json.loads((folder / "state.json").read_text())
    assert kept["attention"] == {shape["shape"]: "flash" for shape in before.shapes}

    with monkeypatch.context() as patch:
        patch.setattr(attention, "fastest", fails)  # which is not asked
        _, again, events = trained(short("again"), folder)
    [after] = told(events)
    assert [shape["kernel"] for shape in after.shapes] == ["flash"] * len(before.shapes)
    assert attention_sentence(after).endswith("as before")
    assert again.state.attention == first.state.attention

    with monkeypatch.context() as patch:  # on another card, or with another PyTorch
        patch.setattr(attention, "fastest", lambda kernels, shape, *others: Chosen(shape, USUAL, {USUAL: 1.0}))
        patch.setattr("lorasmith.trainer.loop.place_of", lambda device: "another card")
        _, elsewhere, events = trained(short("elsewhere"), folder)
    assert {shape["kernel"] for shape in told(events)[0].shapes} == {USUAL}
    assert elsewhere.state.attention_on == "another card"


@pytest.mark.usefixtures("here")
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    def in_turn(kernels: Sequence[Kernel], shape: Shape, *others: Any) -> Chosen:
        return Chosen(shape, ("flash", "math", USUAL)[shape.queries % 3], {USUAL: 1.0})

    def weights(config: RunConfig, *stops: int) -> dict[str, Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        plan, events = make_plan(config), list[Event]()
        folder = create_run(plan.config)
        write_config(plan.config, folder.config)
        monkeypatch.setattr(attention, "fastest", in_turn)
        trainer = Trainer(plan, folder, events.append)
        trainer.train(lambda: trainer.state.step in stops)
        if stops:
            AcceleratorState._reset_state(reset_partial_state=True)
            monkeypatch.setattr(attention, "fastest", fails)  # which is not asked
            run.resume(folder, [], events.append)
            first, second = ([shape["kernel"] for shape in each.shapes] for each in told(events))
            assert first == second
            assert len(set(first)) > 1
        return load_checkpoint(folder.checkpoint(plan.steps)).adapter

    whole, broken = weights(short("whole")), weights(short("broken"), 1)
    assert all(torch.equal(weight, broken[name]) for name, weight in whole.items())


def test_a_kernel_that_was_asked_for_computes_all(short: Callable[..., RunConfig]):
    losses, _, _ = trained(short("usual"))
    found, trainer, events = trained(short("flash", attention="flash", cpu_kernels=True))
    assert told(events) == []
    assert trainer.kernels is not None
    assert trainer.kernels.usual is kernel_named("flash").attend
    assert found == pytest.approx(losses, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot run here


@pytest.mark.parametrize("name", ["xformers", "cudnn", "efficient"])
def test_what_needs_a_card_is_refused_without_one_once(name: str, short: Callable[..., RunConfig]):
    if torch.cuda.is_available():
        pytest.skip("this computer has a GPU")
    with pytest.raises(UserError) as refused:
        make_plan(short("short", attention=name))
    assert str(refused.value) == (
        f'runtime.attention: {name} needs an NVIDIA GPU, and this computer has none. Set runtime.attention = "auto".'
    )


def test_heads_and_precision_that_a_kernel_has_not_are_refused(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    def narrow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[-1] > 48:
            raise RuntimeError(f"heads of {query.shape[-1]} are too wide for {query.dtype}")
        return scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(attention, "KERNELS", (*KERNELS[:1], Kernel("flash", narrow), *KERNELS[2:]))
    with pytest.raises(UserError) as refused:
        make_plan(short("short", base={"model": "pocket"}, attention="flash", precision="bf16"))
    [problem] = refused.value.problems
    assert problem.where == "runtime.attention"
    assert problem.what == (
        "flash cannot compute this base's attention here (1 x 4 heads of 56, 16 x 16, bfloat16): "
        "heads of 56 are too wide for torch.bfloat16"
    )
    assert problem.fix == 'Set runtime.attention = "auto".'


def test_xformers_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError) as refused:
        refuse_unfit("xformers", load_base(inspect_base("pocket")).unet, torch.bfloat16, CPU)
    [problem] = refused.value.problems
    assert ": it is not installed (" in problem.what
    assert problem.fix == 'Install it (pip install xformers). Or: Set runtime.attention = "auto".'


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_xformers_of_another_pytorch_is_told():
    """Here it lacks its kernels, as where it was built for another PyTorch: on a CPU it has none."""
    with pytest.raises(ConfigError) as refused:
        refuse_unfit("xformers", load_base(inspect_base("pocket")).unet, torch.bfloat16, CPU)
    [problem] = refused.value.problems
    assert "device=cpu (supported: {'cuda'})" in problem.what
    if "operator wasn't built" in problem.what:
        assert problem.fix.startswith(f"Install the xformers that was built for PyTorch {torch.__version__}. Or: ")
    assert problem.fix.endswith('Set runtime.attention = "auto".')

"""Blocks that are compiled train what they trained before; whoever has no compiler is told what to install."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import Tensor

from lorasmith.trainer import compiled
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.compiled import batches_of_each_shape, repeated_blocks
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.errors import ConfigError, TrainingError, UserError
from lorasmith.trainer.events import Event, Phase, Sampled, Step, Validated
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.release import Trained, release

Settings = dict[str, Any]

ALL: Settings = {"images": 14, "batch": 7, "accumulate": 1}
"""Of seven pictures: each step has all of them in one batch."""
UNET_ALONE: Settings = {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}}


class Counting:
    """A compiler that traces forward and backward, and runs what it has traced as it is: it takes seconds."""

    def __init__(self) -> None:
        self.compilations = self.calls = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        self.compilations += 1
        traced = aot_eager(graph, inputs)

        def call(*args: Any) -> Any:
            self.calls += 1
            return traced(*args)

        return call


@pytest.fixture
def short(short_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A function that gives a run of a few steps, all pictures of one size, with settings laid over."""

    def make(name: str, compile: bool = True, **over: Any) -> RunConfig:
        config = short_run(**({"name": name, "buckets": {"max_ratio": 1.0}, "budget": ALL} | over))
        config.runtime.compile = compile
        return config

    return make


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    backend = Counting()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    return backend


def trained(config: RunConfig, until: int | None = None) -> tuple[list[Event], Trainer]:
    """What a run told, and its trainer."""
    events: list[Event] = []
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision may be another
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer.train(lambda: trainer.state.step == until)
    return events, trainer


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step)]


def assert_alike(mine: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 2e-4) -> None:
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=atol, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# the same training


WAYS: dict[str, Settings] = {
    "fast layers": {},
    "recomputed": UNET_ALONE | {"runtime": {"gradient_checkpointing": True}},
    "in 8 bits": UNET_ALONE | {"runtime": {"base_weights": "int8"}},
    "in 4 bits": UNET_ALONE | {"runtime": {"base_weights": "nf4"}},
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.exhaustive) if WAYS[way] else way for way in WAYS])
def test_losses_weights_and_names_are_those_of_blocks_that_are_not_compiled(
    way: str, short: Callable[..., RunConfig], counting: Counting
):
    """Each block of each batch is computed by what was compiled, whole."""
    over = {key: dict(value) for key, value in WAYS[way].items()}
    over["runtime"] = {"precision": "fp32"} | over.get("runtime", {})
    usual, before = trained(short("usual", compile=False, **over))
    assert counting.calls == 0
    events, trainer = trained(short("compiled", **over))
    assert losses(events) == pytest.approx(losses(usual), rel=1e-4)
    assert_alike(adapter_state(trainer.base), adapter_state(before.base))
    times = 2 if "gradient_checkpointing" in over["runtime"] else 1
    assert counting.calls == calls_of(trainer, times)
    blocks = sum(1 for _ in repeated_blocks(trainer.base.unet))
    assert counting.compilations - 1 < blocks  # those of a kind share one


def calls_of(trainer: Trainer, times: int = 1) -> int:
    """How often compiled code is called by a run: by each block in each batch, `times` if it is recomputed, and once in
    the trial."""
    plan = trainer.plan
    batches = sum(len(batches) for batches in islice(plan.order.steps(plan.batches_per_step), plan.steps))
    blocks = sum(1 for _ in repeated_blocks(trainer.base.unet))
    return 1 + blocks * times * (len(batches_of_each_shape(plan)) + batches)


def test_previews_and_measures_are_computed_as_before_and_files_have_the_base_s_names(
    short: Callable[..., RunConfig], counting: Counting
):
    sample, validation = {"every": 1, "steps": 1, "prompts": ["a thing"]}, {"every": 1, "draws": 1}
    events, trainer = trained(short("drawn", sample=sample, validation=validation, **UNET_ALONE))
    assert len([event for event in events if isinstance(event, Sampled)]) == 1 + trainer.plan.steps
    assert len([event for event in events if isinstance(event, Validated)]) == 1 + trainer.plan.steps
    assert counting.calls == calls_of(trainer)

    saved = load_checkpoint(trainer.run.checkpoint(trainer.state.step))
    assert_alike(saved.adapter, adapter_state(trainer.base), 0)
    state = trainer.state
    with trainer.as_it_is_used():
        now = Trained(trainer.run, trainer.config, trainer.base, state.step, state.images)
        files = release(now, "compiled", trainer.run.exports)
    exported = [name for file in files if file.suffix == ".safetensors" for name in names_in(file)]
    assert exported
    assert not [name for name in [*saved.adapter, *exported] if "_orig_mod" in name]


def names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


# ---------------------------------------------------------------------------------------------------------------------
# shapes


SEVERAL: Settings = UNET_ALONE | {
    "buckets": {"max_ratio": 2.0},
    "budget": {"images": 6, "batch": 1, "accumulate": 1},
    "save": {"every": 3},
}
"""Of one picture each."""


@pytest.mark.exhaustive
def test_n_and_n_steps_equal_2_n_over_several_shapes_which_are_all_compiled_before_the_first_step(
    short: Callable[..., RunConfig], counting: Counting, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiled, "_FEW_SHAPES", 2)
    whole, by_one = trained(short("whole", **SEVERAL))
    shapes = batches_of_each_shape(by_one.plan)
    assert len(shapes) == 3
    phases = [(event.done, event.total) for event in whole if isinstance(event, Phase) and event.name == "compiling"]
    assert phases == [(number, len(shapes)) for number in range(len(shapes))]
    of_one_run, rest = counting.compilations, []
    in_steps: list[int] = []

    def listen(event: Event) -> None:
        rest.append(event)
        if isinstance(event, Step):
            in_steps.append(counting.compilations)

    plan = make_plan(short("again", **SEVERAL), afresh=False)
    again = Trainer(plan, create_run(plan.config), listen, load_checkpoint(by_one.run.checkpoint(3)))
    again.train(lambda: False)
    assert losses(rest) == losses(whole)[3:]
    assert_alike(adapter_state(again.base), adapter_state(by_one.base), 0)
    assert in_steps == [2 * of_one_run] * 3


# ---------------------------------------------------------------------------------------------------------------------
# the compiler


def test_without_a_compiler_the_plan_says_what_to_install(short: Callable[..., RunConfig]):
    from torch._inductor import config

    here = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with here, pytest.raises(UserError, match="none is at hand") as refused:
        make_plan(short("cold"))
    [problem] = refused.value.problems
    assert problem.where == "runtime.compile"
    assert problem.fix.startswith("Install a C++ compiler")
    assert problem.fix.endswith("or set runtime.compile = false.")
    with here:
        make_plan(short("cold", compile=False))


def test_a_gpu_needs_triton(short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    config = short("on a GPU")
    monkeypatch.setattr("lorasmith.trainer.device.kind_here", lambda: "cuda")
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Triton") as refused:
        compiled.check_compiler(config)
    assert "pip install triton" in refused.value.problems[0].fix


def test_a_compiler_that_fails_is_told_before_anything_is_loaded(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiled, "BACKEND", failing)
    plan, told = make_plan(short("broken compiler")), []
    with pytest.raises(ConfigError, match="the compiler does not work here") as refused:
        Trainer(plan, create_run(plan.config), told.append)
    assert "or set runtime.compile = false" in refused.value.problems[0].fix
    assert not told


def failing(graph: Any, inputs: list[Tensor]) -> Any:
    raise RuntimeError("no such instruction")


def test_a_block_that_cannot_be_compiled_ends_the_run_with_the_way_on(
    short: Callable[..., RunConfig], counting: Counting, monkeypatch: pytest.MonkeyPatch
):
    plan, told = make_plan(short("odd", **UNET_ALONE)), []
    trainer = Trainer(plan, create_run(plan.config), told.append)
    monkeypatch.setattr(Counting, "__call__", lambda self, graph, inputs: failing(graph, inputs))
    with pytest.raises(TrainingError, match="the blocks of this base cannot be compiled") as ended:
        trainer.train(lambda: False)
    assert ended.value.mending.overrides == ("runtime.compile=false",)
    assert not losses(told)


@pytest.mark.parametrize(
    ("over", "what"),
    [
        ({"runtime": {"compile": True, "attention": "xformers"}}, "xformers' attention"),
        ({"runtime": {"compile": True}, "adapter": {"kind": "dora"}}, "PEFT's layers of kind dora"),
    ],
)
def test_what_cannot_be_compiled_whole_is_refused(short_run: Callable[..., RunConfig], over: dict[str, Any], what: str):
    with pytest.raises(ConfigError, match=rf"runtime\.compile: cannot compile {what}"):
        short_run(**over)


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def test_the_plan_says_whether_it_is_on_and_when_it_repays(short: Callable[..., RunConfig]):
    for is_on in (True, False):
        facts = make_plan(short("planned", compile=is_on)).facts()
        [technique] = [one for one in facts["techniques"] if one["name"] == "compile"]
        assert technique["on"] is is_on
        assert "pays from about 500 steps on" in technique["why"]
        assert any("seldom win back" in warning for warning in facts["warnings"]) is is_on
    long = make_plan(short("long", budget={"images": 4000}))
    assert long.steps >= compiled.REPAYS_AFTER
    assert not [warning for warning in long.warnings() if "seldom" in warning]


@pytest.mark.exhaustive
def test_pytorch_s_own_compiler_trains_the_same(short: Callable[..., RunConfig]):
    usual, before = trained(short("usual", compile=False, **SEVERAL))
    events, trainer = trained(short("compiled", **SEVERAL))
    assert losses(events) == pytest.approx(losses(usual), rel=1e-4)
    assert_alike(adapter_state(trainer.base), adapter_state(before.base))

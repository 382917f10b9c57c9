"""Recorded steps train what steps taken one by one train, bit for bit, and what they found is told late, in order.

A CUDA graph can be recorded on a GPU only. Here a recorder stands in for it that calls the recorded function again,
from whose arguments all that it was recorded with has been wiped out: a step that read anything else than its own
memory, or waited for a number, would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.trainer import arrears, loop, plan, stepgraph
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import ConfigError, TrainingError
from lorasmith.trainer.events import Checkpointed, Event, EventLog, Phase, Sampled, Step, Validated, Warned, read_events
from lorasmith.trainer.idle import CAPTURED_WITH
from lorasmith.trainer.inputs import Inputs
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import Tokens
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.stepgraph import unchanged

from . import tiny
from .test_resume import assert_same_runs

ON = {"cuda_graphs": True}
CHECK = plan._check_graphs


class NoWaiting(TorchDispatchMode):
    """Within it nothing may be asked of a device, brought to another one, or drawn."""

    ASKED = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_linalg_check_errors")
    MADE_ON_THE_HOST = ("lift_fresh", "lift")
    DRAWN = ("bernoulli", "bernoulli_", "native_dropout", "rand", "randn", "rand_like", "randn_like", "randint")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in (*self.ASKED, *self.MADE_ON_THE_HOST, *self.DRAWN), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


class NoHost(TorchFunctionMode):
    """Within it no tensor may become a thing of Python's, which on a CPU would cost nothing and so would not show."""

    ASKED = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "pin_memory")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in self.ASKED, func
        return func(*args, **(kwargs or {}))


class Replayer:
    """Stands in for CUDA graphs: what is recorded is called again."""

    replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        for _ in range(stepgraph.WARM_UPS):
            self.watched(work)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            Replayer.replays += 1
            self.watched(work)

        return again

    def watched(self, work: Callable[[], None]) -> None:
        with NoWaiting(), NoHost():
            work()


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded by a `Replayer`; what they were given is wiped out before they are taken."""
    if torch.cuda.is_available():
        pytest.skip("a GPU records them itself: see tests/test_speed.py")
    take_in = Inputs.take_in

    def then_wiped_out(mine: Inputs, given: Inputs) -> None:
        take_in(mine, given)
        for tensor in given.tensors():
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)

    monkeypatch.setattr(Inputs, "take_in", then_wiped_out)
    monkeypatch.setattr(stepgraph, "CudaRecorder", Replayer)
    monkeypatch.setattr(plan, "_check_graphs", lambda config: None)
    monkeypatch.setattr(loop, "steps_ahead", lambda accelerator: arrears.MOST)
    monkeypatch.setattr(arrears, "LONGEST", math.inf)
    monkeypatch.setattr(Replayer, "replays", 0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny.make_sd1(folder / "sd1", layers_per_block=1)
    tiny.make_sdxl(folder / "sdxl", layers_per_block=1)
    return folder


@pytest.fixture
def a_run(bases: Path, short_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(name: str, base: str = "sd1", **over: Any) -> RunConfig:
        usual = {"base": {"model": str(bases / base)}, "budget": {"images": 16, "accumulate": 1}}
        return short_run(**usual | over | {"name": name})

    return make


def with_graphs(config: RunConfig, name: str = "graphs") -> RunConfig:
    values = config.model_dump()
    return validate(values | {"name": name, "runtime": values["runtime"] | ON})


def trainer_of(config: RunConfig, emit: Callable[[Event], None] | None = None, step: int = 0) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision may be another
    found = make_plan(config, afresh=not step)
    folder = RunFolder(Path(config.runs, config.name)) if step else create_run(found.config)
    checkpoint = load_checkpoint(folder.checkpoint(step)) if step else None
    return Trainer(found, folder, emit or EventLog(folder.events).append, checkpoint)


def trained(config: RunConfig, until: int | None = None, step: int = 0) -> Trainer:
    """A run that was carried out, or stopped after a step; from a step on."""
    trainer = trainer_of(config, step=step)
    trainer.train(lambda: trainer.state.step == until)
    return trainer


def told(trainer: Trainer) -> list[Event]:
    """All that was told of a run, but for what the computer took; its name and plan are its own."""
    events = [record.event for record in read_events(trainer.run.events)]
    first = next(number for number, event in enumerate(events) if event.type == "plan")
    return [
        replace(event, seconds=0.0, memory_mib=0.0) if isinstance(event, Step) else event
        for event in events[first + 1 :]
    ]


def warnings_of(trainer: Trainer) -> list[str]:
    return [event.message for event in told(trainer) if isinstance(event, Warned)]


def newest(trainer: Trainer) -> Any:
    return load_checkpoint(trainer.run.checkpoint(trainer.state.step))


def assert_same(graphs: Trainer, eager: Trainer) -> None:
    """Events, weights, the optimizer's state and averages, bit for bit."""
    assert told(graphs) == told(eager)
    assert_same_runs(newest(graphs), newest(eager))


# ---------------------------------------------------------------------------------------------------------------------
# the same training


COMBINATIONS: dict[str, dict[str, Any]] = {
    "text encoder trained": {},
    "frozen, captions dropped": {
        "adapter": {"text_encoder": False},
        "optimizer": {"text_encoder_lr": 0.0, "ema_decay": 0.9},
    },
    "accumulation with a remainder": {"budget": {"images": 20, "batch": 3, "accumulate": 2}},
    "sdxl": {"base": "sdxl"},
    "sdxl, frozen": {"base": "sdxl", "adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}},
    "running average": {"optimizer": {"ema_decay": 0.9}},
    "huber, debiased": {"objective": {"loss": "huber", "weighting": "debiased", "noise_offset": 0.1}},
    "min-snr, l1": {"objective": {"loss": "l1", "weighting": "min-snr"}},
    "masks": {"data": {"mask": "alpha", "unmasked_weight": 0.1}},
    "bf16": {"runtime": {"precision": "bf16"}},
    "bf16 with autocast": {"runtime": {"precision": "bf16", "autocast": True}},
    "many rates, no clipping": {
        "adapter": {"targets": "all"},
        "block": [{"path": "unet.mid_block", "rank": 2, "lr": 1e-4}],
        "optimizer": {"loraplus_ratio": 4.0, "max_grad_norm": 0.0, "schedule": "cosine", "warmup": 0.3},
    },
    "strong clipping, amsgrad": {"optimizer": {"max_grad_norm": 1e-3, "options": {"amsgrad": True}}},
    "peft's own layers": {"runtime": {"fast_lora": False}},
    "dora": {"adapter": {"kind": "dora"}},
    "lokr": {"adapter": {"kind": "lokr"}},
    "new tokens": {"adapter": {"new_tokens": 2}},
    "pissa": {"adapter": {"init": "pissa"}},
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_recorded_steps_train_what_steps_one_by_one_train(case: str, a_run: Callable[..., RunConfig], pictures: Path):
    over = dict(COMBINATIONS[case])
    if case == "masks":
        for file in pictures.glob("*.png"):
            with Image.open(file) as picture:
                picture.convert("RGBA").rotate(20).save(file)
    dropping = {"path": str(pictures), "trigger": "trg", "caption_dropout": 0.5}
    config = a_run("eager", **over | {"data": [dropping | over.get("data", {})]})
    eager, graphs = trained(config), trained(with_graphs(config))
    assert graphs.graphs is not None
    assert all(graphs.graphs.steps.values())
    assert len(graphs.graphs.steps) >= 2
    assert Replayer.replays == graphs.state.step == eager.state.step
    assert_same(graphs, eager)


OTHERS_IN_BETWEEN: dict[str, Any] = {
    "budget": {"images": 26, "accumulate": 1},
    "save": {"every": 7, "keep_best": True},
    "sample": {"every": 6, "steps": 1, "prompts": ["emoji of owl"]},
    "validation": {"every": 4, "draws": 1},
    "optimizer": {"ema_decay": 0.9},
}


def test_what_happens_between_steps_happens_in_the_same_order(a_run: Callable[..., RunConfig]):
    config = a_run("eager", **OTHERS_IN_BETWEEN)
    eager, graphs = trained(config), trained(with_graphs(config))
    kinds = {type(event) for event in told(graphs)}
    assert kinds >= {Step, Phase, Sampled, Validated, Checkpointed}
    assert_same(graphs, eager)
    assert graphs.run.saved_steps() == eager.run.saved_steps()


@pytest.mark.parametrize("until", [1, 5])
def test_n_and_n_recorded_steps_equal_2_n(a_run: Callable[..., RunConfig], until: int):
    config = a_run("whole", optimizer={"ema_decay": 0.9, "schedule": "cosine"})
    eager, whole = trained(config), trained(with_graphs(config, "graphs-whole"))
    trained(with_graphs(config), until)
    again = trained(with_graphs(config), step=until)
    assert again.state.step == whole.state.step > until
    assert_same_runs(newest(again), newest(whole))
    assert_same_runs(newest(again), newest(eager))


def test_a_run_goes_on_without_graphs_and_with_them(a_run: Callable[..., RunConfig]):
    config = a_run("eager")
    eager = trained(config)
    trained(with_graphs(config, "other"), until=4)
    off = with_graphs(config, "other").model_dump()
    off["runtime"]["cuda_graphs"] = False
    assert_same_runs(newest(trained(validate(off), step=4)), newest(eager))


def test_recording_and_replaying_leave_the_global_generators_alone(a_run: Callable[..., RunConfig]):
    trainer = trainer_of(with_graphs(a_run("eager")), lambda event: None)
    before = torch.get_rng_state()
    trainer.train(lambda: trainer.state.step == 3)
    assert Replayer.replays == 3
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# what is not recorded


def test_further_forms_are_taken_one_by_one(a_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stepgraph, "MOST_FORMS", 1)
    config = a_run("eager")
    eager, graphs = trained(config), trained(with_graphs(config))
    assert 0 < Replayer.replays < graphs.state.step
    [warning] = warnings_of(graphs)
    assert warning.startswith("batches of more than 1 forms")
    assert [event for event in told(graphs) if not isinstance(event, Warned)] == told(eager)
    assert_same_runs(newest(graphs), newest(eager))


@pytest.mark.parametrize("where", ["warm_up", "record"])
def test_a_recording_that_fails_changes_nothing_and_is_told_once(
    a_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, where: str
):
    usual, tries = getattr(Replayer, where), []

    def full(mine: Replayer, work: Callable[[], None]) -> Callable[[], None]:
        tries.append(work)
        if len(tries) == 1:
            work()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(mine, work)

    monkeypatch.setattr(Replayer, where, full)
    config = a_run("eager")
    eager, graphs = trained(config), trained(with_graphs(config))
    assert graphs.graphs is not None
    assert list(graphs.graphs.steps.values()).count(None) == 1
    assert len(tries) == len(graphs.graphs.steps)
    assert warnings_of(graphs) == [
        "a step is no CUDA graph, and no faster, for its recording failed: CUDA out of memory."
    ]
    assert_same_runs(newest(graphs), newest(eager))


def test_a_full_memory_halves_batches_also_where_no_graph_is_recorded(
    a_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    """Where the smaller parts fit, their step is recorded."""
    error_of = Trainer._error_of

    def full(trainer: Trainer, denoiser: nn.Module, inputs: Inputs) -> Tensor:
        if inputs.images > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return error_of(trainer, denoiser, inputs)

    config = a_run("eager")
    monkeypatch.setattr(Trainer, "_error_of", full)
    eager, graphs = trained(config), trained(with_graphs(config))
    assert graphs.state.at_once == 1
    assert Replayer.replays > 0
    assert [warning for warning in warnings_of(graphs) if "at a time" in warning] == warnings_of(eager)
    assert_same_runs(newest(graphs), newest(eager))


# ---------------------------------------------------------------------------------------------------------------------
# what is told late


WAYS = pytest.mark.parametrize("way", [with_graphs, lambda config: config], ids=["recorded", "one by one"])
"""A GPU is ahead of its host either way."""
Way = Callable[[RunConfig], RunConfig]


@WAYS
def test_steps_are_told_together_and_before_anything_else(way: Way, a_run: Callable[..., RunConfig]):
    seen: list[tuple[int, str]] = []
    done = [0]
    config = way(a_run("eager", budget={"images": 32, "accumulate": 1}, save={"every": 15}))
    trainer = trainer_of(config, lambda event: seen.append((done[-1], event.type)))

    def should_stop() -> bool:
        done.append(trainer.state.step)
        return False

    trainer.train(should_stop)
    when = [step for step, kind in seen if kind == "step"]
    assert when[:15] == [9] * 10 + [14] * 5  # full after the tenth; the rest before the checkpoint after the fifteenth
    kinds = [kind for _, kind in seen if kind in ("step", "checkpoint")]
    assert kinds.index("checkpoint") == 15
    assert kinds.count("step") == trainer.state.step


@WAYS
def test_a_slow_step_is_told_at_once(way: Way, a_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrears, "LONGEST", 0.0)
    trainer = trainer_of(way(a_run("eager")))
    counts: list[int] = []
    trainer.train(lambda: bool(counts.append(len([event for event in told(trainer) if isinstance(event, Step)]))))
    assert counts[:4] == [0, 1, 2, 3]


def spoil_a_weight(trainer: Trainer) -> None:
    trainer.trained[-1].data.view(-1)[0] = math.nan


def spoil_a_gradient(trainer: Trainer) -> None:
    parameter = trainer.optimized[0]
    assert parameter.grad is not None
    parameter.grad[0] = math.nan


@WAYS
@pytest.mark.parametrize(("spoil", "what"), [(spoil_a_weight, "loss"), (spoil_a_gradient, "gradient")])
def test_a_number_that_is_none_names_its_step_and_nothing_of_it_is_kept(
    spoil: Callable[[Trainer], None], what: str, way: Way, a_run: Callable[..., RunConfig]
):
    """Though some more steps were taken by then. The checkpoint of the eighth step is not written."""
    events: list[Event] = []
    every = {"save": {"every": 4}, "sample": {"every": 8, "steps": 1, "prompts": ["emoji of owl"]}}
    config = way(a_run("eager", budget={"images": 20, "accumulate": 1}, **every))
    trainer = trainer_of(config, events.append)
    reached: list[int] = []

    def should_stop() -> bool:
        reached.append(trainer.state.step)
        if trainer.state.step == 5 and len(reached) == 6:
            spoil(trainer)
        return False

    with pytest.raises(TrainingError) as caught:
        trainer.train(should_stop)
    *before, batches = islice(trainer.plan.order.steps(1), 6)
    files = ", ".join(trainer.plan.examples[shot.image].name for batch in batches for shot in batch)
    assert caught.value.problems[0].what == f"the {what} of step 6 is nan; its images: {files}"
    assert reached[-1] == 7  # the eighth step was taken, and its preview would have come next
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4, 5]
    assert (trainer.state.step, trainer.state.images) == (5, sum(len(batch) for [batch] in before))
    assert trainer.run.saved_steps() == [4]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0]
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(trainer.run.checkpoint(4)).adapter.values())


@WAYS
def test_a_failure_between_steps_comes_after_all_of_them(way: Way, a_run: Callable[..., RunConfig]):
    trainer = trainer_of(way(a_run("eager")))

    def should_stop() -> bool:
        if trainer.state.step == 3:
            raise OSError("the drive is gone")
        return False

    with pytest.raises(OSError, match="gone"):
        trainer.train(should_stop)
    assert [event.step for event in told(trainer) if isinstance(event, Step)] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def an_optimizer() -> torch.optim.AdamW:
    weights = nn.Parameter(torch.ones(5))
    weights.grad = torch.full((5,), 2.0)
    return torch.optim.AdamW([{"params": [weights], "lr": 0.1}], fused=True)


def all_of(optimizer: torch.optim.AdamW) -> Iterator[Tensor]:
    [weights] = optimizer.param_groups[0]["params"]
    yield from (weights, weights.grad, *optimizer.state[weights].values())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_steps_that_are_only_tried_change_nothing(steps_before: int):
    tried, other = an_optimizer(), an_optimizer()
    for optimizer in (tried, other):
        for _ in range(steps_before):
            optimizer.step()
    generator = torch.get_rng_state()
    with unchanged(tried, torch.device("cpu")):
        tried.step()
        next(all_of(tried)).data += torch.rand(5)
        where = [tensor.data_ptr() for tensor in all_of(tried)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert [tensor.data_ptr() for tensor in all_of(tried)] == where
    for optimizer in (tried, other):
        optimizer.step()
    for one, two in zip(all_of(tried), all_of(other), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x if x.any() else -x,
        lambda x: x * torch.tensor([1.0, 2.0]),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
    ],
    ids=["item", "mask", "branch", "constant", "dropout", "cpu", "nonzero"],
)
def test_the_watch_sees_what_waits_for_a_device_or_draws(work: Callable[[Tensor], Any]):
    with pytest.raises(AssertionError):
        Replayer().watched(lambda: work(torch.ones(2)))


def test_batches_of_other_operations_have_another_form(a_run: Callable[..., RunConfig]):
    trainer = trainer_of(a_run("forms"))
    steps = list(islice(trainer.plan.order.steps(1), 8))
    inputs = [trainer._read(batch, 0) for [batch] in steps]
    texts = [one.text for one in inputs if isinstance(one.text, Tokens)]
    forms = {one.form for one in inputs}
    alike = zip(inputs, texts, strict=True)
    assert len(forms) == len({(one.noisy.shape, tuple(text.chunks)) for one, text in alike}) > 1
    one, text = inputs[0], texts[0]
    masked = replace(one, mask=torch.ones_like(one.noisy[:, :1]))
    longer = replace(one, text=Tokens(text.ids, [*text.chunks, 1]))
    assert len({one.form, masked.form, longer.form, replace(one, noisy=one.noisy.bfloat16()).form}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# where there are none


OTHER = {
    "adapter.kind": "oft",
    "adapter.dropout": 0.1,
    "adapter.rank_dropout": 0.1,
    "adapter.module_dropout": 0.1,
    "optimizer.kind": "lion",
    "preference.start": "runs/first",
    "runtime.flat_optimizer": False,
    "runtime.gradient_checkpointing": True,
    "runtime.precision": "fp16",
}


@pytest.mark.parametrize("setting", CAPTURED_WITH)
def test_what_no_graph_can_hold_is_one_error(setting: str):
    section, _, key = setting.partition(".")
    values: dict[str, Any] = {"name": "x", "data": [{"path": "photos", "trigger": "sks"}], "runtime": dict(ON)}
    values.setdefault(section, {})[key] = OTHER[setting]
    if setting in ("adapter.rank_dropout", "adapter.module_dropout"):
        values["adapter"]["kind"] = "lokr"
    with pytest.raises(ConfigError) as caught:
        validate(values)
    [problem] = caught.value.problems
    assert problem.where.endswith("runtime.cuda_graphs")
    assert problem.what.startswith(f"cannot be had, because {setting} is ")
    assert f"{setting} = " in problem.fix


@pytest.mark.parametrize("setting", CAPTURED_WITH)
def test_who_chooses_it_above_a_file_gets_it_without_graphs(setting: str):
    values: dict[str, Any] = {"name": "x", "data": [{"path": "photos", "trigger": "sks"}], "runtime": dict(ON)}
    kind = ["adapter.kind=lokr"] if setting in ("adapter.rank_dropout", "adapter.module_dropout") else []
    value = str(OTHER[setting]).lower()
    assert not validate(values, overrides=[*kind, f"{setting}={value}"]).runtime.cuda_graphs


@pytest.mark.parametrize(
    ("has_gpu", "processes", "has_bf16", "what"),
    [
        (False, 1, True, "needs an NVIDIA GPU, and this computer has none"),
        (True, 2, True, "is for one process, and 2 train together"),
        (True, 1, False, "cannot be had in fp16, which this GPU computes in: its gradients are looked at in each step"),
        (True, 1, True, ""),
    ],
    ids=["no gpu", "two processes", "an old gpu", "a gpu"],
)
def test_a_computer_that_cannot_have_them_is_told(
    has_gpu: bool,
    processes: int,
    has_bf16: bool,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    short_run: Callable[..., RunConfig],
):
    monkeypatch.setattr(plan, "_check_graphs", CHECK)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = short_run(runtime=ON)
    if not what:
        plan.check_devices(config)
        return
    with pytest.raises(ConfigError) as caught:
        plan.check_devices(config)
    [problem] = caught.value.problems
    assert (problem.where, problem.what) == ("runtime.cuda_graphs", what)
    assert problem.fix.startswith("Set runtime.cuda_graphs = false")


def test_the_plan_says_that_they_were_not_tried_on_a_gpu(short_run: Callable[..., RunConfig]):
    facts = make_plan(short_run(runtime=ON)).facts()
    assert any("not been tried on a GPU" in warning for warning in facts["warnings"])
    [technique] = [one for one in facts["techniques"] if one["name"] == "cuda_graphs"]
    assert technique["on"]

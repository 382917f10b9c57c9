"""The validation loss: the same each time, of images that nothing is trained on, and no trace of it in the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.datasets.cache import LatentCache
from lorasmith.datasets.dataset import Example
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.checkpoint import TrainState, load_checkpoint
from lorasmith.trainer.config import ObjectiveSection, RunConfig, ValidationSection
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.estimate import disk_of, pace_of
from lorasmith.trainer.events import Event, EventLog, Phase, PlanMade, Step, Validated, Warned
from lorasmith.trainer.heldout import bands_of, hold_out
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.patience import is_lower, take_in
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.run import export_run, train
from lorasmith.trainer.story import VALIDATING, Story
from lorasmith.ui.train.running import losses, validation_told

from .conftest import gone_on, tiny_run

Make = Callable[..., RunConfig]
State = dict[str, Tensor]

HELD_OUT: dict[str, Any] = {"every": 2, "min_images": 8, "draws": 2}
"""Of eight pictures, two."""
OWN_NOISE: dict[str, Any] = {"every": 2, "draws": 2}
"""Of training images."""


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny base and eight pictures."""
    return tiny_run(tmp_path_factory.mktemp("validation"))


@pytest.fixture
def make(common: dict[str, Any], tmp_path: Path) -> Make:
    """A function that gives a run of three steps, with settings laid over."""
    return lambda **over: validate(merge(common, {"runs": str(tmp_path / "runs")} | over))


def trained(config: RunConfig) -> tuple[State, list[Event]]:
    """What a run came to, as it is trained on, and what it told."""
    plan, events = make_plan(config), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.train(lambda: False) == "finished"
    return adapter_state(trainer.base), events


def validations(events: list[Event]) -> list[Validated]:
    return [event for event in events if isinstance(event, Validated)]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# what is held out


def names(examples: list[Example]) -> set[str]:
    return {example.name for example in examples}


def plan_of(config: RunConfig) -> Plan:
    return make_plan(config)


def test_a_share_is_held_out_and_named_and_the_rest_is_trained(make: Make):
    plan = plan_of(make(validation=HELD_OUT))
    assert (len(plan.held_out), len(plan.examples)) == (2, 6)
    assert not names(plan.held_out) & names(plan.examples)
    told = plan.facts()["validation"]
    assert set(told["held_out"]) == names(plan.held_out)
    assert all(name in told["told"] for name in names(plan.held_out))
    assert told["predictions"] == 2 * 2 * 4  # sides, draws, bands
    assert plan.facts()["images"] == 6


def test_what_is_held_out_stays_so_when_images_are_added_or_renamed(make: Make, tmp_path: Path):
    found = plan_of(make()).examples
    settings = ValidationSection(every=1, share=0.25, min_images=4)
    few, all_of_them = (hold_out(examples, settings)[1] for examples in (found[:6], found))
    assert len(few) == len(all_of_them) == 2
    assert hold_out(found[::-1], settings)[1] == all_of_them[::-1]
    older = sorted(found, key=lambda example: example.item.sha256)
    without_a_trained_one = [example for example in found if example is not older[-1]]
    assert hold_out(without_a_trained_one, settings)[1] == all_of_them


@pytest.mark.parametrize(
    "settings",
    [{"every": 0}, {"every": 1, "share": 0.0}, {"every": 1, "min_images": 9}],
    ids=["never measured", "no share", "too few images"],
)
def test_where_none_is_held_out_all_are_trained(make: Make, settings: dict[str, Any]):
    plan = plan_of(make())
    trained_ones, held_out = hold_out(plan.examples, ValidationSection(**settings))
    assert (trained_ones, held_out) == (plan.examples, [])


def test_twins_are_held_out_together_and_regularisation_images_never(make: Make, common: dict[str, Any]):
    style = common["data"][0]
    settings = ValidationSection(every=1, min_images=4)
    twice = plan_of(make(data=[style, style])).examples
    held_out = hold_out(twice, settings)[1]
    assert len(held_out) == 4
    assert len(names(held_out)) == 2
    again = plan_of(make(data=[style, style | {"regularization": True, "trigger": ""}])).examples
    assert hold_out(again, settings)[1] == []


def test_bands_are_equal_parts_of_what_is_trained():
    assert bands_of(ObjectiveSection()) == [(0, 249), (250, 499), (500, 749), (750, 999)]
    assert bands_of(ObjectiveSection(min_timestep=400, max_timestep=599)) == [
        *((400, 449), (450, 499), (500, 549), (550, 599))
    ]
    assert bands_of(ObjectiveSection(min_timestep=7, max_timestep=8)) == [(7, 7), (8, 8)]


def test_settings_without_effect_are_errors(make: Make):
    with pytest.raises(ConfigError, match=r"validation\.draws.*has no effect, because validation\.every is 0"):
        make(validation={"draws": 3})
    with pytest.raises(ConfigError, match=r"validation\.min_images.*validation\.share is 0"):
        make(validation={"every": 1, "share": 0.0, "min_images": 5})


# ---------------------------------------------------------------------------------------------------------------------
# it changes nothing


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"dropout": 0.5}, "optimizer": {"ema_decay": 0.9}},
        {"optimizer": {"kind": "adamw-schedulefree", "schedule": "constant", "warmup": 0.0}},
    ],
    ids=["dropout, running average", "schedule-free"],
)
def test_training_is_the_same_bit_for_bit(make: Make, settings: dict[str, Any]):
    without, _ = trained(make(**settings))
    measured, events = trained(make(name="measured", validation=OWN_NOISE, **settings))
    assert [event.step for event in validations(events)] == [0, 2, 3]
    assert same(without, measured)


def test_a_run_that_holds_images_out_equals_one_that_never_had_them(make: Make, common: dict[str, Any], tmp_path: Path):
    config = make(name="measured", validation=HELD_OUT)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for example in plan_of(config).examples:
        for file in (example.item.path, example.item.path.with_suffix(".txt")):
            (fewer / file.name).write_bytes(file.read_bytes())
    without, _ = trained(make(data=[common["data"][0] | {"path": str(fewer)}]))
    measured, events = trained(config)
    assert len(validations(events)) == 3
    assert same(without, measured)


def test_an_image_that_is_held_out_is_never_shown(make: Make, monkeypatch: pytest.MonkeyPatch):
    shown: list[Example] = []
    drawn = Trainer._drawn

    def watched(trainer: Trainer, *given: Any) -> Any:
        seen = drawn(trainer, *given)
        shown.extend(one.example for one in seen[0])
        return seen

    monkeypatch.setattr(Trainer, "_drawn", watched)
    config = make(validation=HELD_OUT, budget={"images": 24})
    plan = plan_of(config)
    trained(config)
    assert names(shown) == names(plan.examples)
    assert len(plan.held_out) == 2


# ---------------------------------------------------------------------------------------------------------------------
# it measures the same


def test_the_same_weights_give_the_same_losses(make: Make):
    plan, events = make_plan(make(validation=HELD_OUT)), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer._validate()
    torch.manual_seed(99)
    trainer._validate()
    first, second = validations(events)
    assert first == second
    assert (len(first.validation), len(first.train), first.held_out) == (4, 4, 2)
    assert first.loss == pytest.approx(sum(first.validation) / 4)
    [other] = validations(_validated_once(make(name="other", validation=HELD_OUT | {"seed": 1})))
    assert (other.of == first.of, other.validation == first.validation) == (False, False)


def _validated_once(config: RunConfig) -> list[Event]:
    plan, events = make_plan(config), list[Event]()
    Trainer(plan, create_run(plan.config), events.append)._validate()
    return events


def test_it_is_the_loss_that_training_minimises(make: Make):
    """Measured by hand, of the first held-out image in the last band."""
    plan, events = make_plan(make(validation=HELD_OUT | {"draws": 1})), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.validation is not None
    question = trainer.validation._questions(0, 0)[-1]
    assert question.shown.example in plan.held_out
    assert 750 <= question.drawn.t.item() <= 999
    with torch.no_grad(), trainer.as_it_is_used():
        by_hand = trainer._weighted(trainer.denoiser, [question.shown], question.drawn).item()
    trainer._validate()
    assert validations(events)[0].validation[-1] == pytest.approx(by_hand, abs=2e-6)


def test_without_held_out_images_there_is_no_gap(make: Make):
    [measured] = validations(_validated_once(make(validation=OWN_NOISE)))
    assert validation_told([measured]).endswith("it tells what is learned, and not what is learned by heart.</p>")
    assert (measured.train, measured.gaps, measured.held_out) == ([], [], 0)
    assert measured.predictions == 2 * 4


def test_several_processes_measure_what_one_does(make: Make):
    plan = make_plan(make(validation=HELD_OUT | {"draws": 3}))
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    assert trainer.validation is not None
    with torch.no_grad(), trainer.as_it_is_used():
        ask = lambda shown, drawn: trainer._weighted(trainer.denoiser, shown, drawn)  # noqa: E731
        parts = [trainer.validation.losses(ask, process, 4, lambda done, total: None) for process in range(4)]
        alone = trainer.validation.losses(ask, 0, 1, lambda done, total: None)
    assert torch.equal(sum(parts[1:], parts[0]), alone)
    assert alone.shape == (2, 3, 4)
    assert alone.all()


def test_an_overfitted_run_has_a_growing_gap(make: Make):
    """Four pictures, and a rate at which sixteen steps learn them by heart."""
    settings = {
        "base": {"model": "pocket"},
        "adapter": {"rank": 16, "alpha": 16.0, "targets": "all"},
        "budget": {"images": 64, "batch": 4},
        "optimizer": {"lr": 5e-3, "schedule": "constant"},
        "validation": {"every": 1000, "min_images": 8, "draws": 4, "share": 0.5},
    }
    _, events = trained(make(**settings))
    first, last = validations(events)
    grown = [now - before for now, before in zip(last.gaps, first.gaps, strict=True)]
    assert sum(last.train) < 0.7 * sum(first.train)
    assert sum(grown) > 0.05 * sum(first.train)
    assert sum(gap > 0 for gap in grown) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# what may come in between


def test_a_resumed_run_measures_what_an_unbroken_one_does(make: Make):
    over: dict[str, Any] = {"validation": HELD_OUT, "budget": {"images": 20}}
    _, unbroken = trained(make(name="unbroken", **over))
    plan, stops, again = make_plan(make(**over)), list[Event](), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), stops.append)
    assert trainer.train(lambda: trainer.state.step == 3) == "stopped"
    assert gone_on(trainer, plan, again).train(lambda: False) == "finished"
    assert [one.step for one in validations(stops)] == [0, 2]
    assert validations(unbroken) == [*validations(stops), *validations(again)]


def test_what_is_lost_of_the_caches_is_made_anew(make: Make):
    plan, events = make_plan(make(validation=HELD_OUT)), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer._validate()
    latents = LatentCache(plan.cache, trainer.base.vae_fingerprint)
    latents.path(plan.held_out[0], plan.held_out[0].views[0]).unlink()
    trainer._validate()
    first, second = validations(events)
    assert first == second
    assert next(event.message for event in events if isinstance(event, Warned)).endswith("made anew")


@pytest.mark.parametrize("holds", [2, 0], ids=["two at a time", "none"])
def test_a_full_memory_halves_it_or_leaves_it_out(make: Make, monkeypatch: pytest.MonkeyPatch, holds: int):
    plan, events = make_plan(make(validation=OWN_NOISE)), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), events.append)
    trainer._validate()
    weighted = trainer._weighted

    def full(denoiser: Any, shown: list[Any], drawn: Any) -> Tensor:
        if len(shown) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return weighted(denoiser, shown, drawn)

    monkeypatch.setattr(trainer, "_weighted", full)
    trainer._validate()
    told = [event.message for event in events if isinstance(event, Warned)]
    if holds:
        whole, halved = validations(events)
        assert halved.validation == pytest.approx(whole.validation, rel=1e-4)
        assert told == []
    else:
        assert len(validations(events)) == 1
        assert told == [
            "step 0 has no validation loss: the computer's memory does not hold what a single prediction takes; "
            "training goes on"
        ]


# ---------------------------------------------------------------------------------------------------------------------
# what is kept, and when it ends


def test_lower_is_lower_by_more_than_the_noise():
    assert is_lower([0.9, 1.9, 2.9], [1.0, 2.0, 3.0])
    assert not is_lower([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert not is_lower([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert not is_lower([0.4, 2.5, 3.0], [1.0, 2.0, 3.0])  # by 0.03 on the average, and by 0.55 this way and that
    assert is_lower([0.5], [0.6])


def test_a_state_keeps_the_lowest_in_mind():
    state = TrainState()
    for number, measured, of in [
        *((1, [2.0, 4.0], "a"), (2, [1.0, 3.0], "a"), (3, [1.0, 3.0], "a"), (4, [math.nan, 0.0], "a")),
        *((5, [0.9, 2.9], "a"), (6, [9.0, 9.0], "a")),
    ]:
        state.step = number
        take_in(state, measured, of)
    assert (state.best_step, state.best_losses, state.not_lower) == (5, [0.9, 2.9], 1)
    state.step = 7
    take_in(state, [9.0], "other questions")
    assert (state.best_step, state.not_lower) == (7, 0)


DIVERGES: dict[str, Any] = {
    "validation": HELD_OUT | {"patience": 2},
    "save": {"every": 3, "keep": 1, "keep_best": True},
    "export": {"checkpoint": "best", "formats": ["diffusers"], "precision": "fp32"},
    "optimizer": {"lr": 0.3, "text_encoder_lr": 0.3, "schedule": "constant", "warmup": 0.0},
    "budget": {"images": 40},
}
"""A run that soon does not get better any more."""
STANDS_STILL: dict[str, Any] = {
    "validation": HELD_OUT | {"patience": 2},
    "optimizer": {"lr": 1e-12, "text_encoder_lr": 1e-12, "schedule": "constant", "warmup": 0.0},
    "budget": {"images": 40},
}
"""A run whose weights are too large to change by so little."""


def test_a_run_ends_early_keeps_its_best_checkpoint_and_exports_it(make: Make):
    run = RunFolder(Path(train(make_plan(make(**DIVERGES)), lambda event: None).run.path))
    story = Story(run.events)
    status = run.status(story)
    assert status.state == "done"
    assert status.step < status.steps
    best = story.validations[-1].best
    assert best == status.step - 4
    assert status.sentence == (
        f"Done early, after {status.step} of {status.steps} steps: "
        f"the validation loss has not become lower since step {best}."
    )
    assert run.saved_steps() == [best, status.step]
    of_steps = [load_checkpoint(run.checkpoint(saved)).adapter for saved in run.saved_steps()]
    name, [mine, last] = next((n, [of_step[n] for of_step in of_steps]) for n in of_steps[0] if "lora_B" in n)
    exported = load_file(run.exports / "run-diffusers.safetensors")
    assert any(torch.equal(tensor, mine) for tensor in exported.values()), name
    assert not any(torch.equal(tensor, last) for tensor in exported.values())

    again = export_run(run.path, None, [], run.path / "again")
    assert load_file(again[0]).keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in load_file(again[0]).items())


def test_a_resumed_run_has_waited_as_long_as_an_unbroken_one(make: Make):
    plan, told = make_plan(make(**STANDS_STILL)), list[Event]()
    trainer = Trainer(plan, create_run(plan.config), told.append)
    assert trainer.train(lambda: trainer.state.not_lower == 1) == "stopped"
    resumed = gone_on(trainer, plan, told)
    assert resumed.train(lambda: False) == "finished"
    assert (trainer.state.step, resumed.state.step, resumed.state.best_step) == (4, 6, 2)
    assert resumed.ended_early

    killed_before_it_could_say_so = gone_on(resumed, plan, told)
    assert killed_before_it_could_say_so.train(lambda: False) == "finished"
    assert killed_before_it_could_say_so.state.step == resumed.state.step
    longer = make_plan(make(**STANDS_STILL | {"budget": {"images": 80}}))
    assert gone_on(resumed, longer, told).state.not_lower == 0


def test_the_best_needs_a_measure_and_a_checkpoint(make: Make):
    with pytest.raises(ConfigError, match=r"save\.keep_best: has no effect, because validation\.every is 0"):
        make(save={"keep_best": True})
    dropped = validate(
        merge(make(**DIVERGES).model_dump(), {"name": "dropped"}), "run.toml", ["validation.every=0", "sample.every=0"]
    )
    assert (dropped.save.keep_best, dropped.export.checkpoint) == (False, "last")
    with pytest.raises(ConfigError, match=r"export\.checkpoint: cannot be had, because save\.keep_best is false"):
        make(export={"checkpoint": "best"})


def test_the_disk_holds_the_best_checkpoint_as_well(make: Make):
    plan = make_plan(make(**DIVERGES))
    assert disk_of(plan.facts(), plan.config).checkpoints == 2


# ---------------------------------------------------------------------------------------------------------------------
# what is told


def test_its_time_is_foreseen_from_earlier_runs(make: Make):
    plan = make_plan(make(validation=HELD_OUT))
    log = EventLog(create_run(plan.config).events)
    log.append(PlanMade(5, plan.images, plan.facts(), every={"validation": 2}))
    for one in (Phase(VALIDATING, 0, 8), event(0, 0.9), *map(step, range(1, 25))):
        log.append(one)
    story = Story(log.path)
    story.refresh()
    story.prediction_seconds[0] = 0.5
    other = make_plan(make(name="other", validation=HELD_OUT | {"draws": 4}))
    pace = pace_of(other.facts(), other.config, [story])
    assert pace is not None
    assert pace.validation == pytest.approx(0.5 * 2 * 4 * 4)
    assert pace.seconds(5, other.config) == pytest.approx(5 * pace.step + 4 * pace.validation)  # at 0, 2, 4 and 5


def test_the_time_left_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, log = [100.0], EventLog(tmp_path / "events.jsonl")
    monkeypatch.setattr("lorasmith.trainer.events.time.time", lambda: clock[0])

    def left(every: dict[str, int]) -> float | None:
        log.path.unlink(missing_ok=True)
        for wait, one in [(0, PlanMade(40, 160, every=every)), (0, Phase(VALIDATING)), (10, event(0, 0.9))]:
            clock[0] += wait
            log.append(one)
        for number in range(1, 26):
            log.append(step(number))
        story = Story(log.path)
        story.refresh()
        return story.seconds_left()

    assert left({}) == pytest.approx(15)
    assert left({"validation": 10}) == pytest.approx(15 + 2 * 10)  # at 30 and 40


def event(step: int, loss: float, gap: float = 0.1, of: str = "a") -> Validated:
    return Validated(step, ["0-499", "500-999"], [loss, loss], [loss - gap, loss - gap], 2, 8, of)


def step(number: int) -> Step:
    return Step(number, 4 * number, 0.5, 0.1, {"unet": 1e-4}, 1.0)


def test_a_story_keeps_what_stands(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    for one in (PlanMade(40, 160, every={"validation": 2}), event(0, 0.9), step(1), step(2), event(2, 0.8), step(3)):
        log.append(one)
    story = Story(log.path)
    story.refresh()
    assert story.validations == [event(0, 0.9), event(2, 0.8)]
    for one in (PlanMade(40, 160), step(2), Phase(VALIDATING), event(2, 0.7)):
        log.append(one)
    story.refresh()
    assert story.validations == [event(0, 0.9), event(2, 0.7)]
    assert len(story.prediction_seconds) == 1
    assert story.phase is None


def test_the_page_shows_the_curve_and_the_gap_of_what_can_be_compared(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    for one in (event(0, 5.0, of="other"), step(1), step(2), event(2, 0.9, 0.1), step(3), step(4), event(4, 0.8, 0.25)):
        log.append(one)
    story = Story(log.path)
    story.refresh()
    shown = losses(story.curve(), story.validations)
    validated = shown[shown["line"] == "validation"]
    assert list(zip(validated["step"], validated["loss"], strict=True)) == [(2, 0.9), (4, 0.8)]
    told = validation_told(story.validations)
    assert "of 2 images held out, went from 0.9 to 0.8" in told
    assert "<td>+0.2500</td><td>+0.1000</td>" in told
    assert "Gap at step 2" in told
    assert validation_told([]) == ""

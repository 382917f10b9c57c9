"""Scores while a run trains: the same pictures each time, the best kept, an early end, and no trace in the training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.trainer import loop
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.checkpoint import TrainState, load_checkpoint
from lorasmith.trainer.choosing.choice import Scores
from lorasmith.trainer.choosing.judge import judge_wall
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.console import scores_sentence
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.events import Event, EventLog, Phase, PlanMade, Scored, Step, Warned
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.painting.studio import Studio
from lorasmith.trainer.painting.wall import wall_order
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.run import train
from lorasmith.trainer.scoring import take_in
from lorasmith.trainer.story import SCORING, Story
from lorasmith.ui.train.running import scores_told

from .conftest import gone_on, tiny_run

Make = Callable[..., RunConfig]
SCORED: dict[str, Any] = {"every": 2, "by": "scores", "draws": 3}
PROMPTS = ["trg, thing 1", "trg, a cat"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny base and eight pictures."""
    return tiny_run(tmp_path_factory.mktemp("scoring")) | {
        "budget": {"images": 16, "batch": 4},
        "sample": {"every": 10, "steps": 2, "prompts": PROMPTS},
    }


@pytest.fixture
def make(common: dict[str, Any], tmp_path: Path) -> Make:
    """A function that gives a run of four steps, with settings laid over."""
    return lambda **over: validate(merge(common, {"runs": str(tmp_path / "runs")} | over))


def begun(config: RunConfig) -> tuple[Trainer, list[Event]]:
    plan, events = make_plan(config), list[Event]()
    return Trainer(plan, create_run(plan.config), events.append), events


def scored(events: list[Event]) -> list[Scored]:
    return [event for event in events if isinstance(event, Scored)]


def test_scores_come_at_every_measure_and_the_base_has_none_of_the_style(make: Make):
    trainer, events = begun(make(validation=SCORED))
    assert trainer.train(lambda: False) == "finished"
    told = scored(events)
    assert [one.step for one in told] == [0, 2, 4]
    assert (told[0].style, told[0].prompt, told[0].best) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3), 0)
    assert all(one.pictures == 3 and one.of == told[0].of for one in told)
    assert told[-1].style != told[0].style
    before = [event for event, after in pairwise(events) if isinstance(after, Scored)]
    assert before == [Phase(SCORING)] * 3
    assert scores_sentence(told[0]) == "style 0.00, prompt 1.00, copying " + f"{told[0].copying:z.2f}"


def test_the_style_is_that_of_a_wall_of_the_same_pictures(make: Make):
    far = {"lr": 3e-2, "text_encoder_lr": 1e-2}
    trainer, events = begun(make(validation=SCORED | {"draws": 1, "seed": 77}, optimizer=far))
    trainer.train(lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    order = wall_order(trainer.run, steps=[4], strengths=[0, 1], prompts=PROMPTS[:1], seeds=[77])
    wall, told = judge_wall(order, Studio()).cell(4, 1.0).scores.style, scored(events)[-1].style
    assert abs(wall) > 0.01
    assert told == pytest.approx(wall, rel=0.2)


def test_training_is_the_same_bit_for_bit(make: Make):
    states: list[dict[str, Tensor]] = []
    for settings in ({}, {"name": "scored", "validation": SCORED}):
        trainer, _ = begun(make(**settings))
        trainer.train(lambda: False)
        states.append(adapter_state(trainer.base))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_image_is_held_out_and_what_would_hold_some_out_is_refused(make: Make):
    plan = make_plan(make(validation=SCORED))
    assert not plan.held_out
    assert (plan.facts()["validation"]["by"], plan.facts()["validation"]["pictures"]) == ("scores", 3)
    with pytest.raises(ConfigError, match=r'validation\.share: has no effect, because validation\.by is "scores"'):
        make(validation=SCORED | {"share": 0.2})
    with pytest.raises(ConfigError, match=r"validation\.by: has no effect, because validation\.every is 0"):
        make(validation={"by": "scores"})


def test_a_resumed_run_scores_as_an_unbroken_one(make: Make):
    config = make(validation=SCORED | {"every": 1})
    trainer, unbroken = begun(config)
    trainer.train(lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    stopped, events = begun(config.model_copy(update={"name": "stopped"}))
    assert stopped.train(lambda: stopped.state.step == 2) == "stopped"
    resumed = gone_on(stopped, stopped.plan, events)
    resumed.train(lambda: False)
    assert scored(events) == scored(unbroken)
    assert resumed.state.scored == trainer.state.scored


def test_without_previews_captions_are_drawn(make: Make):
    trainer, events = begun(make(validation=SCORED | {"draws": 5}, sample={"every": 0, "prompts": [], "steps": 2}))
    trainer.train(lambda: False)
    assert trainer.scoring is not None
    assert [prompt.startswith("trg, thing") for prompt in trainer.scoring.prompts] == [True] * 5
    assert len(scored(events)) == 3


def test_a_full_memory_leaves_them_out(make: Make, monkeypatch: pytest.MonkeyPatch):
    drawn = loop.draw

    def full(base: Any, prompts: Any, drawing: Any) -> Any:
        if drawing.seed == 9:
            raise MemoryError
        return drawn(base, prompts, drawing)

    monkeypatch.setattr(loop, "draw", full)
    trainer, events = begun(make(validation=SCORED | {"seed": 9}))
    assert trainer.train(lambda: False) == "finished"
    warned = [event.message for event in events if isinstance(event, Warned) and "no scores" in event.message]
    assert [message.split(":")[0] for message in warned] == [f"step {step} has no scores" for step in (0, 2, 4)]
    assert not scored(events)


# ---------------------------------------------------------------------------------------------------------------------
# the best


def standing(*each: tuple[float, float, float]) -> list[tuple[int, int]]:
    """The best step, and how often it was not better since, after each of such scores of steps 1, 2, ..."""
    state, found = TrainState(), []
    for step, scores in enumerate(each, 1):
        state.step = step
        take_in(state, Scores(*scores), 16, "a")
        found.append((state.best_step, state.not_lower))
    return found


def test_more_style_is_better_until_it_copies_or_loses_its_prompts():
    assert standing((0.2, 0.9, 0), (0.5, 0.8, 0), (0.9, 0.7, 0.1)) == [(1, 0), (2, 0), (3, 0)]
    assert standing((0.5, 0.8, 0), (0.9, 0.7, 0.9)) == [(1, 0), (1, 1)]
    assert standing((0.5, 0.8, 0), (0.9, 0.1, 0)) == [(1, 0), (1, 1)]


def test_as_much_style_is_better_where_more_of_the_prompts_is_kept():
    assert standing((0.9, 0.5, 0), (0.85, 0.7, 0), (0.87, 0.5, 0)) == [(1, 0), (2, 0), (2, 1)]


def test_small_losses_of_style_do_not_add_up():
    falling = [(0.9 - 0.08 * n, 0.4 + 0.06 * n, 0.0) for n in range(5)]
    assert standing(*falling)[-1] == (2, 3)


def test_the_first_of_all_is_none_if_it_copies():
    assert standing((0.9, 0.5, 0.8), (0.4, 0.5, 0)) == [(0, 1), (2, 0)]


def test_scores_of_something_else_begin_anew():
    state = TrainState(step=1)
    take_in(state, Scores(0.9, 0.9, 0), 16, "a")
    state.step = 2
    take_in(state, Scores(0.1, 0.9, 0), 16, "b")
    assert (state.best_step, state.best_of, len(state.scored)) == (2, "b", 1)


def test_a_run_ends_early_keeps_its_best_checkpoint_and_exports_it(make: Make):
    stands_still = {
        "validation": SCORED | {"every": 1, "patience": 2},
        "optimizer": {"lr": 1e-12, "text_encoder_lr": 1e-12},
        "budget": {"images": 48, "batch": 4},
        "save": {"every": 0, "keep_best": True},
        "export": {"checkpoint": "best", "formats": ["kohya"], "precision": "fp32"},
    }
    finished = train(make_plan(make(**stands_still)), lambda event: None)
    story = Story(finished.run.events)
    status = finished.run.status(story)
    best = story.scores[-1].best
    assert status.step == best + 2 < status.steps
    assert status.sentence.endswith(f"the scores have not become better since step {best}.")
    assert finished.run.saved_steps() == [best, status.step]
    exported = load_file(finished.run.exports / "run.safetensors")
    mine, last = (load_checkpoint(finished.run.checkpoint(step)).adapter for step in (best, status.step))
    name = next(name for name in mine if "unet" in name and "lora_B" in name)
    assert any(torch.equal(tensor, mine[name]) for tensor in exported.values())
    assert not any(torch.equal(tensor, last[name]) for tensor in exported.values())


# ---------------------------------------------------------------------------------------------------------------------
# what is told


def event(step: int, style: float, of: str = "a", best: int = 0) -> Scored:
    return Scored(step, style, 0.5, 0.1, pictures=16, of=of, best=best)


def test_a_story_keeps_what_stands_and_how_long_a_picture_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("lorasmith.trainer.events.time.time", lambda: now)
    log = EventLog(tmp_path / "events.jsonl")

    def at(seconds: float, *events: Event) -> None:
        nonlocal now
        now = seconds
        for each in events:
            log.append(each)

    at(0, PlanMade(4, 16, {}, [], {"scores": 2, "sample": 0, "save": 0}), Phase(SCORING))
    at(50, event(0, 0.0))
    at(51, Step(1, 4, 0.1, 0.1, {}, 1.0))
    at(52, Step(2, 8, 0.1, 0.1, {}, 1.0), Phase(SCORING))
    at(84, event(2, 0.6, best=2))
    story = Story(tmp_path / "events.jsonl")
    story.refresh()
    assert [one.step for one in story.scores] == [0, 2]
    assert list(story.scored_seconds) == [2.0]  # the first time others are drawn as well
    at(85, Step(2, 8, 0.1, 0.1, {}, 1.0))  # a resume from step 1
    story.refresh()
    assert [one.step for one in story.scores] == [0]


def test_the_page_shows_the_scores_that_can_be_compared():
    assert scores_told([]) == ""
    told = scores_told([event(0, 0.9, of="b"), event(10, 0.25), event(20, 0.75, best=20)])
    assert "The best so far are those of step 20." in told
    assert "0.25" in told
    assert "0.75" in told
    assert "0.90" not in told
    many = scores_told([event(10 * n, n / 100) for n in range(100)])
    assert many.count("<tr>") <= 14
    assert "990" in many

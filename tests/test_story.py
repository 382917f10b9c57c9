"""The story of a run: what still counts of its log, read as it grows, and what can be told from it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.trainer.events import (
    AttentionChosen,
    Checkpointed,
    Done,
    Event,
    EventLog,
    Failed,
    Phase,
    PlanMade,
    Sampled,
    Step,
    Stopped,
    Warned,
)
from lorasmith.trainer.story import DRAWING, SAVING, Story


def step(number: int, loss: float = 0.5, seconds: float = 0.5) -> Step:
    return Step(number, 4 * number, loss, 0.5, {"unet": 1e-4 * number}, seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def append(path: Path, *events: Event) -> None:
    log = EventLog(path)
    for event in events:
        log.append(event)


def story_of(path: Path, *events: Event) -> Story:
    append(path, *events)
    story = Story(path)
    story.refresh()
    return story


# ---------------------------------------------------------------------------------------------------------------------
# what still counts


def test_of_a_run_that_was_not_killed_everything_stands(path: Path):
    story = story_of(
        path,
        Phase("encoding images", 1, 4),
        PlanMade(10, 40),
        Sampled(0, "s0", ["a"]),
        step(1),
        Checkpointed(1, "c1"),
        Warned("a warning"),
        Failed("went wrong", 3),
        Stopped(3),
        Done(10, ["exports/x.safetensors"]),
    )
    assert story.plan == PlanMade(10, 40)
    assert (list(story.steps), story.samples, story.checkpoints) == (
        [step(1)],
        [Sampled(0, "s0", ["a"])],
        [Checkpointed(1, "c1")],
    )
    assert story.warnings == ["a warning"]
    assert story.ended == story.last_word == Done(10, ["exports/x.safetensors"])


def test_a_probe_of_attention_ends_its_phase_and_the_newest_stands(path: Path):
    chosen = [AttentionChosen("a card", [{"shape": "a shape", "kernel": kernel}]) for kernel in ("flash", "sdpa")]
    story = story_of(path, PlanMade(10, 40), chosen[0], PlanMade(10, 40), Phase("probing attention", 1, 4))
    assert (story.attention, story.phase) == (chosen[0], Phase("probing attention", 1, 4))
    story = story_of(path, chosen[1])
    assert (story.attention, story.phase) == (chosen[1], None)


def test_a_step_that_comes_again_supersedes_all_from_it_on(path: Path):
    kept = [PlanMade(9, 36), Sampled(0, "s0", ["a"]), step(1), step(2), Checkpointed(2, "c2"), Sampled(2, "s2", ["a"])]
    undone = [step(3), step(4), Sampled(4, "s4", ["a"]), Checkpointed(4, "c4"), step(5), Sampled(5, "s5", ["a"])]
    again = [PlanMade(9, 36), step(3, 0.25), step(4, 0.25), Sampled(4, "s4", ["b"]), Checkpointed(4, "c4"), Done(4, [])]
    story = story_of(path, *kept, *undone, *again)
    assert list(story.steps) == [step(1), step(2), step(3, 0.25), step(4, 0.25)]
    assert story.samples == [Sampled(0, "s0", ["a"]), Sampled(2, "s2", ["a"]), Sampled(4, "s4", ["b"])]
    assert story.checkpoints == [Checkpointed(2, "c2"), Checkpointed(4, "c4")]
    assert len(story.steps.smoothed) == len(story.steps.times) == 4


def test_a_run_killed_twice_counts_each_step_once(path: Path):
    story = story_of(path, step(1), step(2), step(3), step(2, 0.25), step(3, 0.25), step(3, 0.125), step(4))
    assert list(story.steps) == [step(1), step(2, 0.25), step(3, 0.125), step(4)]


def test_a_run_begun_again_shows_the_untouched_base_once(path: Path):
    story = story_of(path, Sampled(0, "s0", ["a"]), step(1), step(2), Sampled(2, "s2", ["a"]), Sampled(0, "s0", ["b"]))
    assert [sample.prompts for sample in story.samples] == [["b"], ["a"]]
    append(path, step(1, 0.25))
    story.refresh()
    assert story.samples == [Sampled(0, "s0", ["b"])]
    assert list(story.steps) == [step(1, 0.25)]


def test_a_checkpoint_saved_twice_is_told_once(path: Path):
    story = story_of(path, step(1), Checkpointed(1, "a"), Stopped(1), Checkpointed(1, "b"))
    assert story.checkpoints == [Checkpointed(1, "b")]


def test_a_part_that_is_trained_for_a_while_has_a_rate_then_only(path: Path):
    rates = [{"unet": 1e-4}, {"unet": 1e-4, "tokens": 1e-3}, {"tokens": 1e-3}]
    story = story_of(path, *(replace(step(number), lr=lr) for number, lr in enumerate(rates, 1)))
    assert [taken.lr for taken in story.steps] == rates
    assert [point.lr for point in story.curve()] == rates


# ---------------------------------------------------------------------------------------------------------------------
# reading as it grows


def test_there_is_no_story_without_a_log(path: Path):
    story = Story(path)
    assert story.refresh() is False
    assert (story.started, story.last, story.step, story.loss, story.curve()) == (None, None, 0, None, [])


def test_only_what_was_appended_is_read(path: Path):
    story = story_of(path, PlanMade(9, 36), step(1))
    assert story.refresh() is False
    append(path, step(2))
    assert story.refresh() is True
    assert list(story.steps) == [step(1), step(2)]
    assert story.started is not None
    assert story.last is not None
    assert story.started <= story.last


def test_read_line_by_line_it_is_as_read_at_once(path: Path):
    events = [step(1), Sampled(1, "s", ["a"]), step(2), step(3), PlanMade(9, 36), step(2, 0.25), Sampled(1, "s", ["b"])]
    growing = Story(path)
    for event in events:
        append(path, event)
        growing.refresh()
    at_once = story_of(path)
    assert list(growing.steps) == list(at_once.steps)
    assert growing.steps.smoothed == at_once.steps.smoothed
    assert (growing.samples, growing.last) == (at_once.samples, at_once.last)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_read_when_it_has_its_end(path: Path, cut: int):
    append(path, step(1), step(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    story = Story(path)
    story.refresh()
    assert list(story.steps) == [step(1)]
    path.write_bytes(whole)
    assert story.refresh() is True
    assert list(story.steps) == [step(1), step(2)]


def test_a_log_that_shrank_is_read_anew(path: Path):
    story = story_of(path, step(1), step(2), Checkpointed(2, "c"))
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert story.refresh() is True
    assert (list(story.steps), story.checkpoints) == ([step(1)], [])


def test_a_longer_log_in_its_place_is_read_anew(path: Path, tmp_path: Path):
    """A run folder that was removed, and a new run of the same name."""
    story = story_of(path, step(1), step(2))
    append(tmp_path / "other.jsonl", *(step(number, 0.25) for number in range(1, 9)))
    shutil.copy(tmp_path / "other.jsonl", path)
    assert story.refresh() is True
    assert list(story.steps) == [step(number, 0.25) for number in range(1, 9)]


def test_a_log_that_was_removed_leaves_nothing(path: Path):
    story = story_of(path, PlanMade(9, 36), step(1))
    path.unlink()
    assert story.refresh() is True
    assert (len(story.steps), story.plan, story.last) == (0, None, None)
    assert story.refresh() is False


# ---------------------------------------------------------------------------------------------------------------------
# what goes on


def test_the_phase_is_what_goes_on_besides_steps(path: Path):
    story = Story(path)
    for event, phase in [
        (Phase("loading the base"), Phase("loading the base")),
        (Phase("encoding images", 3, 9), Phase("encoding images", 3, 9)),
        (PlanMade(9, 36), None),
        (Phase(DRAWING), Phase(DRAWING)),
        (Sampled(0, "s", []), None),
        (step(1), None),
        (Phase(SAVING), Phase(SAVING)),
        (step(2), None),
        (Phase("exporting and verifying"), Phase("exporting and verifying")),
        (Done(2, []), None),
    ]:
        append(path, event)
        story.refresh()
        assert story.phase == phase


@pytest.mark.parametrize("word", [Done(2, []), Stopped(2), Failed("out of ink")])
def test_the_last_word_holds_until_a_resume_takes_a_step(path: Path, word: Done | Stopped | Failed):
    story = story_of(path, step(2), word)
    assert story.ended == story.last_word == word
    append(path, Phase("loading the base"))
    story.refresh()
    assert (story.ended, story.last_word) == (None, word)
    append(path, step(3))
    story.refresh()
    assert (story.ended, story.last_word) == (None, None)


def test_a_word_is_of_now_or_of_an_earlier_start(path: Path):
    story = story_of(path, step(2), Stopped(2))
    assert story.size == path.stat().st_size
    assert story.ended_since(story.size - 1)
    assert not story.ended_since(story.size)


# ---------------------------------------------------------------------------------------------------------------------
# curves and the time left


def test_the_curve_of_a_short_run_has_all_of_its_steps(path: Path):
    curve = story_of(path, step(1, 1.0), step(2, 0.5)).curve()
    assert [(point.step, point.loss, point.lr) for point in curve] == [
        (1, 1.0, {"unet": 1e-4}),
        (2, 0.5, {"unet": 2e-4}),
    ]
    assert [point.smoothed for point in curve] == [1.0, pytest.approx(0.975)]


def test_the_curve_of_a_long_run_is_thinned_evenly_with_its_ends(path: Path):
    story = story_of(path, *(step(number) for number in range(1, 1002)))
    curve = story.curve(11)
    assert [point.step for point in curve] == list(range(1, 1002, 100))


def test_a_loss_that_is_no_number_does_not_spoil_the_average(path: Path):
    story = story_of(path, step(1, 1.0), step(2, math.nan), step(3, 1.0))
    assert list(story.steps.smoothed) == [1.0, 1.0, 1.0]


def test_a_first_loss_that_is_no_number_does_not_spoil_all_later_ones(path: Path):
    assert story_of(path, step(1, math.nan), step(2, 1.0), step(3, 1.0)).loss == 1.0


def timed(path: Path, *records: tuple[float, Event]) -> Story:
    """A story whose records were written at these moments."""
    append(path, *(event for _, event in records))
    lines = path.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for (moment, _), line in zip(records, lines, strict=True):
            file.write(f'{{"time": {moment}, {line.partition(", ")[2]}\n')
    story = Story(path)
    story.refresh()
    return story


def steps_from(first: int, last: int, seconds: float = 0.5) -> Sequence[tuple[float, Event]]:
    return [(100.0 + number, step(number, seconds=seconds)) for number in range(first, last + 1)]


def test_in_the_first_steps_after_a_start_the_time_left_is_not_told(path: Path):
    plan = (1.0, PlanMade(100, 400))
    assert timed(path, plan, *steps_from(1, 19)).seconds_left() is None
    path.unlink()
    assert timed(path, plan, *steps_from(1, 20)).seconds_left() == pytest.approx(80 * 0.5)
    path.unlink()
    resumed = timed(path, plan, *steps_from(1, 40), plan, *steps_from(41, 45))
    assert resumed.seconds_left() is None
    assert resumed.seconds_per_step == 0.5


def test_the_time_left_goes_by_the_last_fifty_steps(path: Path):
    story = timed(path, (1.0, PlanMade(100, 400)), *steps_from(1, 30, seconds=9.0), *steps_from(31, 80, seconds=0.25))
    assert story.seconds_left() == pytest.approx(20 * 0.25)
    assert story.seconds_per_step == 0.25


def test_previews_and_checkpoints_to_come_are_counted_with_the_time_they_took(path: Path):
    """Of 100 steps, 30 are taken: previews come at 40, 60, 80 and 100, checkpoints at 50 and 100."""
    story = timed(
        path,
        (1.0, PlanMade(100, 400, every={"sample": 20, "save": 50})),
        (2.0, Phase(DRAWING)),
        (5.0, Sampled(0, "s", [])),
        *steps_from(1, 20),
        (121.0, Phase(DRAWING)),
        (125.0, Sampled(20, "s", [])),
        (126.0, Phase(SAVING)),
        (128.0, Checkpointed(20, "c")),
        *steps_from(21, 30),
    )
    assert story.seconds_left() == pytest.approx(70 * 0.5 + 4 * 4.0 + 2 * 2.0)


def test_what_is_due_at_this_very_step_is_still_to_come(path: Path):
    before = [
        (1.0, PlanMade(40, 160, every={"sample": 20, "save": 0})),
        (2.0, Phase(DRAWING)),
        (5.0, Sampled(0, "s", [])),
        *steps_from(1, 20),
    ]
    assert timed(path, *before).seconds_left() == pytest.approx(20 * 0.5 + 2 * 3.0)
    path.unlink()
    drawn = [*before, (121.0, Phase(DRAWING)), (124.0, Sampled(20, "s", []))]
    assert timed(path, *drawn).seconds_left() == pytest.approx(20 * 0.5 + 3.0)


def test_a_run_that_never_draws_waits_for_no_previews(path: Path):
    story = timed(
        path,
        (1.0, PlanMade(40, 160, every={"sample": 0, "save": 0})),
        *steps_from(1, 25),
        (126.0, Phase(DRAWING)),
        (199.0, Sampled(25, "asked for", [])),
    )
    assert story.seconds_left() == pytest.approx(15 * 0.5)


def test_a_log_of_an_earlier_version_is_a_story_too(path: Path):
    path.write_text(
        '{"time": 1.0, "type": "plan", "steps": 4, "images": 16, "plan": {}, "parts": []}\n'
        '{"time": 2.0, "type": "step", "step": 1, "images": 4, "loss": 0.5, "grad_norm": 1, "lr": {"unet": 1}, '
        '"seconds": 0.5}\n{"time": 3.0, "type": "error", "message": "x", "step": 1}\n',
        encoding="utf-8",
    )
    story = Story(path)
    story.refresh()
    assert list(story.steps) == [replace(step(1), grad_norm=1, lr={"unet": 1})]
    assert story.steps[0].memory_mib == 0
    assert story.ended == Failed("x", 1)

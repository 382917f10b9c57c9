"""What days of work bring: memory that stays flat, a page that shows a part of very much, files that are bounded."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.estimate import disk_of
from lorasmith.trainer.events import Checkpointed, Event, EventLog, Phase, PlanMade, Sampled, Step, Warned
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.story import SAVING, Story
from lorasmith.ui.train.running import MOST_ROWS, samples_table, shown_rows, warnings_of

STEPS = 5_000
_BYTES_OF_A_STEP = 120
"""Nine numbers of eight bytes, and the room that an array keeps for more."""
_OF_OTHERS = 150_000
"""Bytes that other threads of the tests' process may take meanwhile; a curve that was kept is more."""


def a_step(number: int) -> Step:
    return Step(number, 4 * number, 0.1 + 1 / number, 0.5, {"unet": 1e-4}, 0.5, 7432.5)


def write_log(path: Path, events: Iterator[Event]) -> None:
    """As an `EventLog` writes it, but at once."""
    with path.open("w", encoding="utf-8") as log:
        for event in events:
            log.write(json.dumps({"time": 1.0, "type": event.type, **asdict(event)}) + "\n")


@pytest.fixture
def allocated() -> Iterator[Callable[[], tuple[int, int]]]:
    """Bytes of Python's objects that are held now, and at most so far."""
    tracemalloc.start()

    def held() -> tuple[int, int]:
        gc.collect()
        return tracemalloc.get_traced_memory()

    yield held
    tracemalloc.stop()


def test_a_step_of_a_long_run_takes_some_tens_of_bytes(tmp_path: Path, allocated: Callable[[], tuple[int, int]]):
    path = tmp_path / "events.jsonl"
    write_log(path, map(a_step, range(1, STEPS + 1)))
    tracemalloc.clear_traces()
    story = Story(path)
    story.refresh()
    held, most = allocated()
    assert story.step == len(story.steps) == STEPS
    assert held < STEPS * _BYTES_OF_A_STEP
    assert most < STEPS * _BYTES_OF_A_STEP + path.stat().st_size / 4  # the file was never in memory as a whole


def test_looking_again_and_again_keeps_nothing(tmp_path: Path, allocated: Callable[[], tuple[int, int]]):
    path = tmp_path / "events.jsonl"
    write_log(path, map(a_step, range(1, 101)))
    story, log = Story(path), EventLog(path)

    def look(step: int) -> None:
        log.append(a_step(step))
        assert story.refresh()
        if step % 20 == 0:
            story.curve()

    for step in range(101, 201):
        look(step)
    before, _ = allocated()
    for step in range(201, 1201):
        look(step)
    held, _ = allocated()
    assert held - before < 1000 * _BYTES_OF_A_STEP + _OF_OTHERS


def test_the_work_for_many_resumes_grows_with_their_number(tmp_path: Path):
    """Each undoes the last step, preview and checkpoint: a look at all the others each time would be the square."""

    def calls(resumes: int) -> int:
        path, counted = tmp_path / f"{resumes}.jsonl", 0

        def events() -> Iterator[Event]:
            for step in range(1, resumes + 1):
                yield from (a_step(step), Sampled(step, "s", ["a"]), Checkpointed(step, "c"))
            for _ in range(resumes):
                yield from (PlanMade(resumes, 4 * resumes), a_step(resumes), Sampled(resumes, "s", ["b"]))

        def count(*_: Any) -> None:
            nonlocal counted
            counted += 1

        write_log(path, events())
        story = Story(path)
        sys.setprofile(count)
        story.refresh()
        sys.setprofile(None)
        assert len(story.steps) == len(story.samples) == len(story.checkpoints) + 1 == resumes
        return counted

    assert calls(400) < 2.2 * calls(200)


def test_the_log_grows_by_a_line_for_each_step(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(a_step(1))
    first = log.path.stat().st_size
    for number in range(2, 102):
        log.append(a_step(number))
    assert log.path.stat().st_size - first < 100 * 2 * first


# ---------------------------------------------------------------------------------------------------------------------
# the page


@pytest.mark.parametrize("count", [1, 2, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1, 2_000, 100_000])
def test_of_very_many_previews_an_even_part_is_shown_with_both_ends(count: int):
    places = shown_rows(count)
    assert len(places) == min(count, len(places)) <= MOST_ROWS
    assert (places[0], places[-1]) == (0, count - 1)
    assert len({later - earlier for earlier, later in pairwise(places[:-1])}) <= 1


def test_rows_that_are_shown_stay_while_others_come():
    for count in range(2, 300):
        before, after = set(shown_rows(count)) - {count - 1}, set(shown_rows(count + 1))
        assert before <= after or len(after) <= len(before) / 2 + 2  # each second one is left out then


def test_the_table_of_previews_is_bounded(short_run: Callable[..., RunConfig]):
    run = create_run(short_run())
    events = (Sampled(10 * number, f"s{number}", ["a", "b"]) for number in range(500))
    write_log(run.events, events)
    story = Story(run.events)
    story.refresh()
    table = samples_table(run, story)
    rows = len(shown_rows(500))
    assert table.count('scope="row"') == rows
    assert f"{rows} rounds of 500; all are in samples, in the run&#x27;s folder." in table
    assert table.index("step 0, the untouched base") < table.index("step 4,990") < table.index("step 320")


def test_very_many_warnings_are_told_of_in_part(short_run: Callable[..., RunConfig]):
    run = create_run(short_run())
    write_log(run.events, (Warned(f"warning {number // 2}") for number in range(1000)))
    story = Story(run.events)
    story.refresh()
    told = warnings_of(story)
    assert told.count("notice") == 21
    assert "480 earlier warnings are in events.jsonl" in told
    assert told.count("warning 499.") == 1


# ---------------------------------------------------------------------------------------------------------------------
# the disk


def test_a_run_that_saves_at_each_step_keeps_two_and_no_more_than_was_foretold(short_run: Callable[..., RunConfig]):
    over = {"save": {"every": 1, "keep": 2}, "sample": {"every": 2, "steps": 1, "prompts": ["a"]}}
    plan = make_plan(short_run(base={"model": "pocket"}, **over))  # of a tiny one names take more than numbers
    run, disk = create_run(plan.config), disk_of(plan.facts(), plan.config)
    kept: list[tuple[int, int]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Checkpointed) or event == Phase(SAVING):
            files = [file for file in run.checkpoints.rglob("*") if file.is_file()]
            kept.append((len(run.saved_steps()), sum(file.stat().st_size for file in files)))

    assert Trainer(plan, run, listen).train(lambda: False) == "finished"
    assert len(kept) == 2 * plan.steps
    assert max(count for count, _ in kept) == 2
    assert max(size for _, size in kept) == pytest.approx(disk.saved, rel=0.2)
    drawn = [file.stat().st_size for file in (run.path / "samples").rglob("*.png")]
    assert len(drawn) == disk.previews
    assert sum(drawn) < 1.5 * disk.previews * disk.preview

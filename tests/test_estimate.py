"""How long a run takes and what it writes, foreseen from earlier runs and from what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.estimate import Disk, amount, disk_of, free_bytes, lack_of_disk, pace_of
from lorasmith.trainer.events import EventLog, Phase, PlanMade, Sampled, Step, read_events
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.story import DRAWING, Story

from .conftest import trained_run


def earlier(plan: Plan, seconds: list[float]) -> Story:
    """A run whose steps took so long."""
    run = create_run(plan.config)
    log = EventLog(run.events)
    log.append(PlanMade(len(seconds), plan.images, plan.facts()))
    for number, took in enumerate(seconds, 1):
        log.append(Step(number, 4 * number, 0.1, 0.1, {"unet": 1e-4}, took))
    story = Story(run.events)
    story.refresh()
    return story


# ---------------------------------------------------------------------------------------------------------------------
# time


def test_the_pace_is_the_median_of_earlier_steps(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(name="now"))
    stories = [
        earlier(make_plan(short_run(name="a")), [9.0, 1.0, 1.0, 1.0, 1.0]),
        earlier(make_plan(short_run(name="b")), [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
    ]
    pace = pace_of(plan.facts(), plan.config, stories)
    assert pace is not None
    assert (pace.runs, pace.step, pace.picture) == (2, 3.0, 0.0)
    assert pace.seconds(10, plan.config) == 30.0


@pytest.mark.parametrize(
    "other",
    [
        {"budget": {"batch": 4}},
        {"adapter": {"rank": 8}},
        {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}},
        {"data.resolution": 96},
        {"runtime": {"gradient_checkpointing": True}},
        {"base": {"model": "random:sd15"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_runs_of_another_kind_tell_nothing(short_run: Callable[..., RunConfig], pictures: Path, other: dict[str, Any]):
    if "data.resolution" in other:
        other = {"data": [{"path": str(pictures), "trigger": "trg", "resolution": other["data.resolution"]}]}
    plan = make_plan(short_run(name="now"))
    story = earlier(make_plan(short_run(name="other", **other)), [1.0] * 10)
    assert pace_of(plan.facts(), plan.config, [story]) is None


def test_a_run_of_a_few_steps_tells_nothing(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(name="now"))
    story = earlier(make_plan(short_run(name="a")), [1.0] * 4)
    assert pace_of(plan.facts(), plan.config, [story, Story(Path("/none/events.jsonl"))]) is None


def refining(plan: Plan, batch: int, pairs: int = 4, thumbs: int = 0) -> dict[str, Any]:
    """The facts of a plan as they would be of a run that learns from preferences."""
    said = {"pairs": pairs, "thumbs_up": thumbs, "thumbs_down": 0, "beta": 1000.0, "start": "x"}
    return plan.facts() | {"batch": batch, "preference": said}


def as_told(story: Story, facts: dict[str, Any]) -> Story:
    """The run with other facts of its plan."""
    EventLog(story.path).append(PlanMade(len(story.steps), 16, facts))
    story.refresh()
    return story


@pytest.mark.parametrize(
    ("pairs", "thumbs", "batch", "checkpointing", "factor"),
    [(4, 0, 2, False, 4 / 3), (4, 0, 2, True, 5 / 4), (0, 4, 4, False, 4 / 3), (4, 0, 4, False, None)],
    ids=["pairs", "recomputed", "thumbs", "twice as many at once"],
)
def test_a_run_that_refines_is_as_one_with_as_many_pictures_and_a_pass_more(
    short_run: Callable[..., RunConfig], pairs: int, thumbs: int, batch: int, checkpointing: bool, factor: float | None
):
    """Of a pair both pictures are in the batch, and the reference sees each once more."""
    runtime = {"runtime": {"gradient_checkpointing": checkpointing}}
    plan = make_plan(short_run(name="now", **runtime))
    plain = earlier(make_plan(short_run(name="ink", **runtime)), [3.0] * 5)
    assert plan.facts()["batch"] == 4
    pace = pace_of(refining(plan, batch, pairs, thumbs), plan.config, [plain])
    if factor is None:
        assert pace is None
    else:
        assert pace is not None
        assert pace.step == pytest.approx(3 * factor)
        assert pace.source == "one run without preferences took here, and a forward pass more for the reference"


def test_a_run_that_refines_is_told_by_others_that_did_and_tells_nothing_of_plain_ones(
    short_run: Callable[..., RunConfig],
):
    plan = make_plan(short_run(name="now"))
    plain = earlier(make_plan(short_run(name="ink")), [3.0] * 5)
    same = as_told(earlier(make_plan(short_run(name="inkier")), [5.0] * 5), refining(plan, 2))
    half_thumbs = as_told(earlier(make_plan(short_run(name="thumbs")), [7.0] * 5), refining(plan, 2, 2, 2))
    pace = pace_of(refining(plan, 2), plan.config, [plain, same, half_thumbs])
    assert pace is not None
    assert (pace.runs, pace.step, pace.source) == (1, 5.0, "one such run took here")
    ordinary = pace_of(plan.facts() | {"batch": 2}, plan.config, [same, half_thumbs])
    assert ordinary is None


def test_previews_count_by_their_pictures_and_steps(short_run: Callable[..., RunConfig]):
    sample = {"every": 2, "steps": 5, "prompts": ["a", "b"]}
    plan = make_plan(short_run(name="now", sample=sample))
    story = earlier(make_plan(short_run(name="a", sample=sample)), [1.0] * 5)
    log = EventLog(story.path)
    log.append(Phase(DRAWING))
    log.append(Sampled(5, "samples/step-000005", ["a", "b"]))
    story.refresh()
    *_, began, drawn = read_events(story.path)
    pace = pace_of(plan.facts(), plan.config, [story])
    assert pace is not None
    assert pace.picture == pytest.approx((drawn.time - began.time) / 10)
    rounds = 1 + 3  # of the base, and at steps 2, 4 and 5
    assert pace.seconds(5, plan.config) == pytest.approx(5 + rounds * 2 * 5 * pace.picture)


# ---------------------------------------------------------------------------------------------------------------------
# disk


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["plain", "averaged"])
def test_a_checkpoint_is_as_large_as_foreseen(short_run: Callable[..., RunConfig], ema: float):
    over = {"optimizer": {"ema_decay": ema}, "adapter": {"rank": 16, "alpha": 16.0}, "save": {"every": 2}}
    config = short_run(base={"model": "pocket"}, **over)
    plan = make_plan(config)
    foreseen = disk_of(plan.facts(), plan.config)
    trainer = trained_run(config)
    folder = trainer.run.checkpoint(trainer.run.saved_steps()[-1])
    assert foreseen.checkpoints == len(trainer.run.saved_steps()) == 3
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert foreseen.checkpoint == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    ("save", "checkpoints"),
    [({"every": 0}, 1), ({"every": 3}, 2), ({"every": 1}, 5), ({"every": 1, "keep": 2}, 2)],
)
def test_checkpoints_are_counted_as_they_are_kept(short_run: Callable[..., RunConfig], save: Any, checkpoints: int):
    plan = make_plan(short_run(save=save))
    assert plan.steps == 5
    assert disk_of(plan.facts(), plan.config).checkpoints == checkpoints


@pytest.mark.parametrize(("every", "rounds"), [(0, 0), (2, 4), (5, 2)])
def test_previews_are_foreseen(short_run: Callable[..., RunConfig], every: int, rounds: int):
    drawn = {"prompts": ["a", "b"]} if every else {}
    plan = make_plan(short_run(sample={"every": every} | drawn))
    disk = disk_of(plan.facts(), plan.config)
    assert (plan.steps, disk.previews) == (5, 2 * rounds)
    assert disk.preview == pytest.approx(plan.base.resolution**2 * 2)


def test_files_to_share_are_foreseen(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(export={"precision": "fp32", "bundle": True}))
    weights = sum(part.parameters for part in plan.parts)
    disk = disk_of(plan.facts(), plan.config)
    assert (disk.files, disk.file) == (4, 4 * weights)
    assert disk.needed > disk.saved + disk.checkpoint + 4 * disk.file


def test_a_disk_that_is_too_small_is_told_with_numbers(tmp_path: Path):
    disk = Disk(checkpoints=10, checkpoint=170_000_000, files=2, file=9_000_000, previews=1000, preview=500_000)
    assert lack_of_disk(disk, disk.needed, tmp_path) is None
    problem = lack_of_disk(disk, 1_200_000_000, tmp_path)
    assert problem is not None
    assert problem.what == (
        "the run writes about 2.5 GB (10 checkpoints of 170 MB, 1,000 previews of 500 kB and 2 files of 9.0 MB), "
        "and 1.2 GB are free on its disk"
    )


def test_free_bytes_are_those_of_the_disk_even_where_nothing_is_yet(tmp_path: Path):
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.05)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (170e6, "170 MB"), (9.96e6, "10 MB"), (5e12, "5,000 GB")],
)
def test_amounts_have_a_unit_that_a_person_would_use(count: int, text: str):
    assert amount(count) == text

"""Twenty runs in the queue: the worker trains them all, in their order, and keeps of each what it should."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.queue import Queue, begin
from lorasmith.trainer.story import Story

from ..measured import Measured
from .material import some_images

RUNS, KEEP = 20, 2
_LONGEST = 15 * 60


def queued_runs(folder: Path) -> Iterator[Measured]:
    queue, images = Queue(folder / "runs"), some_images(folder / "images")
    runs = [begin(_config(f"run-{number:02d}", images, folder), queue) for number in range(1, RUNS + 1)]
    _wait_for(queue)
    stories = [_story_of(run) for run in runs]
    failed = sum(run.status().state != "done" for run in runs)
    began = [story.started or 0.0 for story in stories]
    turned = sum(later < earlier for earlier, later in pairwise(began))
    yield Measured(f"{RUNS} runs in the queue: not done in the end", failed, 0, "runs")
    yield Measured(f"{RUNS} runs in the queue: out of their turn", turned, 0, "runs")
    kept = max(len(run.saved_steps()) for run in runs)
    yield Measured(f"checkpoints of a run that saved {_STEPS} and keeps {KEEP}", kept, KEEP, "folders")
    work = [file for run in runs for file in run.path.rglob("*") if file.suffix == ".tmp" or ".unverified" in file.name]
    yield Measured("files of unfinished work that were left", len(work), 0, "files")


_STEPS = 4


def _config(name: str, images: Path, folder: Path) -> RunConfig:
    values: dict[str, Any] = {
        "name": name,
        "data": [{"path": str(images), "trigger": "mystyle"}],
        "adapter": {"rank": 2, "alpha": 2.0},
        "budget": {"images": 2 * _STEPS, "batch": 2},
        "save": {"every": 1, "keep": KEEP},
        "sample": {"every": 0},
        "export": {"formats": ["kohya"]},
        "runtime": {"cache": str(folder / "cache")},
    }
    return RunConfig.model_validate(values)


def _wait_for(queue: Queue) -> None:
    """Until the worker has ended; a run that hangs is a miss too."""
    end = time.monotonic() + _LONGEST
    while (queue.waiting() or queue.worker.alive()) and time.monotonic() < end:
        time.sleep(1)


def _story_of(run: RunFolder) -> Story:
    story = Story(run.events)
    story.refresh()
    return story

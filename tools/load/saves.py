"""A run that saves at each step and keeps two checkpoints: what is on the disk at every moment, how its log grows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasmith.trainer import run as training
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.estimate import disk_of
from lorasmith.trainer.events import Checkpointed, Event, Step
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.plan import make_plan

from ..measured import Measured
from .material import some_images

STEPS, KEEP = 60, 2
_BYTES_OF_A_STEP = 400


def many_saves(folder: Path) -> Iterator[Measured]:
    plan = make_plan(_config(folder))
    run, disk = RunFolder(folder / "runs" / plan.config.name), disk_of(plan.facts(), plan.config)
    kept, log = [], []

    def listen(event: Event) -> None:
        if isinstance(event, Checkpointed):
            files = [file for file in run.checkpoints.rglob("*") if file.is_file()]
            kept.append((len(list(run.checkpoints.iterdir())), sum(file.stat().st_size for file in files)))
        if isinstance(event, Step):
            log.append(run.events.stat().st_size)

    training.train(plan, listen)
    folders, size = max(count for count, _ in kept), max(size for _, size in kept)
    what = f"{STEPS} saves with save.keep = {KEEP}: checkpoints at any moment"
    yield Measured(what, folders, KEEP, "folders")
    yield Measured("their size against what the plan foretold", size / disk.saved, 1.1, "times")
    growth = (log[-1] - log[0]) / (len(log) - 1)
    yield Measured("a step, a checkpoint and previews in the log", growth, 3 * _BYTES_OF_A_STEP, "bytes")
    drawn = [file.stat().st_size for file in (run.path / "samples").rglob("*.png")]
    yield Measured("previews against the count that the plan foretold", len(drawn) / disk.previews, 1, "times")
    foretold = disk.previews * disk.preview
    yield Measured("their size against what the plan foretold", sum(drawn) / foretold, 1.5, "times")


def _config(folder: Path) -> RunConfig:
    values: dict[str, Any] = {
        "name": "saves",
        "runs": str(folder / "runs"),
        "data": [{"path": str(some_images(folder / "images")), "trigger": "mystyle"}],
        "adapter": {"rank": 16, "alpha": 16.0},
        "budget": {"images": STEPS, "batch": 1},
        "save": {"every": 1, "keep": KEEP},
        "sample": {"every": 1, "steps": 1, "prompts": ["mystyle"]},
        "export": {"formats": ["kohya"]},
        "runtime": {"cache": str(folder / "cache")},
    }
    return RunConfig.model_validate(values)

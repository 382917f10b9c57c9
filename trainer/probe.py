"""A short measured try of a run, on this computer, at its largest batch: how long a step takes, and how much memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..datasets.buckets import Shot
from ..datasets.dataset import Example
from .arrears import Arrears
from .bench.peaks import forget_peak, peak
from .config import RunConfig
from .events import Event, Phase, Step, Warned
from .footprint import Largest
from .jobs import create_run
from .plan import Plan

STEPS = 2
"""Steps that count; one before them is slow and does not."""


@dataclass(frozen=True)
class Probed:
    """What was measured."""

    batch_seconds: float
    """Of the largest batch, forward and backward, with the optimizer's step."""
    largest: Largest
    peak: int
    """Bytes: the most that the process, or tensors on a GPU, took so far, from loading on."""
    training: int | None
    """Likewise in training alone; None where the system cannot tell it from what loading took."""

    def seconds(self, plan: Plan) -> float:
        """At most about so many for the steps of a run, without previews: no batch takes longer than the largest."""
        return (plan.steps - plan.step) * plan.batches_per_step * self.batch_seconds

    def facts(self, plan: Plan) -> dict[str, Any]:
        largest = self.largest
        return {
            "batch": largest.images,
            "bucket": f"{largest.width}x{largest.height}",
            "steps": STEPS,
            "s_per_batch": self.batch_seconds,
            "seconds": self.seconds(plan),
            "peak_bytes": self.peak,
            "training_bytes": self.training,
        }


def probe(plan: Plan, tell: Callable[[Event], None]) -> Probed:
    """Take a few real steps of the run, in a temporary folder; the caches that it fills are those of the run.

    Raises:
        TrainingError: as training does.
    """
    from .loop import Trainer

    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="lorasmith-probe-", ignore_cleanup_errors=True) as folder:
        short, largest = _at_its_largest(plan, Path(folder))

        def emit(event: Event) -> None:
            if isinstance(event, Step):
                seconds.append(event.seconds)
            elif isinstance(event, Phase | Warned):
                tell(event)

        trainer = Trainer(short, create_run(short.config), emit)
        device = trainer.accelerator.device
        trainer.arrears = Arrears(device, most=1)  # also a GPU is waited for, so that each step has a time of its own
        loading, can_forget = peak(device), forget_peak(device)
        tell(Phase("trying a few steps"))
        trainer.train(lambda: len(seconds) > STEPS)
        training = peak(device)
    return Probed(median(seconds[1:]), largest, max(loading, training), training if can_forget else None)


def _at_its_largest(plan: Plan, folder: Path) -> tuple[Plan, Largest]:
    """A plan of the largest batch alone, again and again, with nothing saved and drawn on the way."""
    largest = Largest.of(plan)
    examples = [_as_shown(plan.examples[shot.image], shot) for shot in largest.shots]
    short = _short(plan.config, folder, largest.images)
    return replace(plan, config=short, examples=examples, held_out=[]), largest


def _as_shown(example: Example, shot: Shot) -> Example:
    """An image in one of its views, once an epoch."""
    view = example.views[shot.number % len(example.views)]
    source, item = replace(example.source, weight=1.0, machine_weight=1.0), replace(example.item, repeats=1)
    return replace(example, item=item, source=source, views=(view,))


def _short(config: RunConfig, folder: Path, images: int) -> RunConfig:
    short = config.model_copy(deep=True)
    short.name, short.runs = "probe", str(folder)
    short.budget.accumulate, short.budget.images = 1, (STEPS + 3) * images
    short.save.every, short.sample.every, short.sample.prompts = 0, 0, []
    short.validation.every = 0
    return short

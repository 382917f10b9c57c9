"""`python -m tools.load.reading RUN`: what it takes to keep in step with a run, measured in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lorasmith.trainer.events import EventLog, Step
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.story import Story

_TICKS, _SETTLED = 1000, 100
"""Looks in all, and those after which memory must not grow."""


def measure_reading(run: RunFolder) -> dict[str, float]:
    """Seconds of work and MiB, by what took them."""
    empty = _mib()
    story = Story(run.events)
    found = {"first": _seconds(story.refresh), "story": _mib() - empty, "curve": _seconds(story.curve)}
    log, last, ticks = EventLog(run.events), story.step, []
    settled = 0.0
    for tick in range(1, _TICKS + 1):
        log.append(Step(last + tick, 4 * (last + tick), 0.1, 0.5, {"unet": 1e-4, "text_encoder": 5e-5}, 0.5, 7432.5))
        ticks.append(_seconds(lambda: run.status(story)))
        if tick % 10 == 0:
            story.curve()
        if tick == _SETTLED:
            settled = _mib()
    return found | {"tick": sorted(ticks)[_TICKS // 2], "growth": _mib() - settled}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    print(json.dumps(measure_reading(RunFolder(Path(sys.argv[1])))))

"""A run of two days as its folder shows it: its log, and the folders of its previews and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import write_config
from lorasmith.trainer.events import Checkpointed, Event, Phase, PlanMade, Sampled, Step
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.story import DRAWING, SAVING

HOURS, EVERY = 48, 100
PROMPTS = ["mystyle, a house by the sea", "mystyle, a cat asleep", "mystyle, a portrait", "a portrait"]


def simulate(path: Path, steps: int) -> RunFolder:
    """A run of so many steps in 48 hours, with previews and a checkpoint each 100; twice as many were planned."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True)
    write_config(RunConfig.model_validate({"name": path.name, "data": [{"path": "images"}]}), run.config)
    with run.events.open("w", encoding="utf-8") as log:  # at once, for an `EventLog` flushes to the disk
        for moment, event in events_of(steps):
            log.write(json.dumps({"time": moment, "type": event.type, **asdict(event)}) + "\n")
            if isinstance(event, Sampled):
                _previews(run, event.step)
            elif isinstance(event, Checkpointed):
                run.checkpoint(event.step).mkdir()
    return run


def events_of(steps: int) -> Iterator[tuple[float, Event]]:
    """With the moment of each, in seconds since the run began."""
    seconds = HOURS * 3600 / steps
    yield 0.0, PlanMade(2 * steps, 8 * steps, every={"sample": EVERY, "save": EVERY})
    yield 1.0, Sampled(0, "samples/step-000000", PROMPTS)
    for step in range(1, steps + 1):
        now = round(1 + step * seconds, 3)
        rates = {"unet": 1e-4 * (1 - step / (2 * steps)), "text_encoder": 5e-5 * (1 - step / (2 * steps))}
        yield now, Step(step, 4 * step, 0.1 + 1 / step, 0.5, rates, seconds, 7432.5)
        if step % EVERY == 0:
            yield now, Phase(DRAWING)
            yield now, Sampled(step, f"samples/step-{step:06d}", PROMPTS)
            yield now, Phase(SAVING)
            yield now, Checkpointed(step, f"checkpoints/step-{step:06d}")


def _previews(run: RunFolder, step: int) -> None:
    run.samples(step).mkdir(parents=True)
    for number in range(len(PROMPTS)):
        (run.samples(step) / f"{number:02d}.png").write_bytes(_PICTURE)


def _picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "PNG")
    return file.getvalue()


_PICTURE = _picture()

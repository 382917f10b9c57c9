"""What a person wants to see on a wall: checkpoints, strengths, a prompt and its look; and how long it takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...trainer.config import RunConfig
from ...trainer.errors import UserError
from ...trainer.files import write_text
from ...trainer.jobs import RunFolder
from ...trainer.jsonfile import read_json
from ...trainer.painting.orders import Look, WallOrder
from ...trainer.painting.wall import STRENGTHS, default_steps, without_trigger
from ...trainer.story import Story

_ROWS = 6  # five spread over the run, and the final one
_STRONGEST, _MOST_COLUMNS = 4.0, 8


@dataclass(frozen=True)
class Choices:
    """What a person wants to see on the wall. Those of the last drawing are kept beside its pictures."""

    steps: tuple[int, ...]
    strengths: tuple[float, ...]
    prompt: str
    """With the trigger."""
    leak: bool
    """Leave the trigger out of it."""
    seed: int
    second_seed: bool
    look: Look
    scored: bool = True
    """Have the cells scored, and one recommended."""

    @classmethod
    def usual(cls, run: RunFolder, config: RunConfig) -> Choices:
        """A few checkpoints from the first to the last, drawn as the run's previews are."""
        sample = config.sample
        prompt = next(iter(prompts_of(config)), "")
        return cls(usual_steps(run), STRENGTHS, prompt, False, sample.seed, False, Look.of(sample))

    @classmethod
    def remembered(cls, run: RunFolder) -> Choices | None:
        """Those of the last drawing, but for checkpoints that are gone; None if there is none of them."""
        try:
            kept = read_json(order_file(run))
            kept["look"] = Look(**kept["look"])
            kept["steps"] = [step for step in kept["steps"] if step in checkpoints_of(run)]
            choices = choices_of(answers_of(cls(**kept)))  # as if they had been typed
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            return None
        return choices if choices.steps else None

    def remember(self, run: RunFolder) -> None:
        write_text(order_file(run), json.dumps(asdict(self), indent=1) + "\n")

    def order(self, run: RunFolder, config: RunConfig) -> WallOrder:
        """What the painter is asked for.

        Raises:
            UserError: if no checkpoint is chosen.
        """
        if not self.steps:
            raise UserError("no checkpoint is ticked", "Checkpoints", "Tick at least one.")
        prompt, *others = dict.fromkeys(self._asked(each, config) for each in (self.prompt, *prompts_of(config)))
        seeds = (self.seed, self.seed + 1) if self.second_seed else (self.seed,)
        scored_with = tuple(others) if self.scored else None
        return WallOrder(str(run.path), self.steps, self.strengths, (prompt,), seeds, self.look, scored_with)

    def _asked(self, prompt: str, config: RunConfig) -> str:
        for trigger in triggers_of(config) if self.leak else ():
            prompt = without_trigger(prompt, trigger)
        return prompt


def order_file(run: RunFolder) -> Path:
    return run.path / "compare" / "order.json"


def checkpoints_of(run: RunFolder) -> tuple[int, ...]:
    """The steps that can be drawn with; step 0 is the untouched base, which is strength 0 on a wall."""
    return tuple(step for step in run.saved_steps() if step)


def usual_steps(run: RunFolder) -> tuple[int, ...]:
    return tuple(step for step in default_steps(run, _ROWS) if step)


def prompts_of(config: RunConfig) -> list[str]:
    return list(dict.fromkeys(config.sample.prompts))


def triggers_of(config: RunConfig) -> list[str]:
    return list(dict.fromkeys(data.trigger for data in config.data if data.trigger))


def read_strengths(text: str) -> tuple[float, ...]:
    """The columns of a wall, from "0, 0.4, 0.7".

    Raises:
        UserError: for what is no such text.
    """
    fix = f"Write up to {_MOST_COLUMNS} numbers from {-_STRONGEST:g} to {_STRONGEST:g}, as in 0, 0.4, 0.7, 1."
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        numbers = tuple(dict.fromkeys(float(word) for word in words))
    except ValueError as error:
        raise UserError(f"{text!r} holds what is no number", "Strengths", fix) from error
    if not numbers or len(numbers) > _MOST_COLUMNS:
        raise UserError(f"{len(numbers)} strengths are {'too many' if numbers else 'too few'}", "Strengths", fix)
    if wrong := [number for number in numbers if not math.isfinite(number) or abs(number) > _STRONGEST]:
        raise UserError(f"{wrong[0]:g} is no strength", "Strengths", fix)
    return numbers


def answers_of(choices: Choices) -> dict[str, Any]:
    """The values of the questions."""
    look = choices.look
    return {
        "prompt": choices.prompt,
        "leak": choices.leak,
        "second_seed": choices.second_seed,
        "scored": choices.scored,
        "steps": list(choices.steps),
        "strengths": ", ".join(f"{strength:g}" for strength in choices.strengths),
        "seed": choices.seed,
        "negative_prompt": look.negative_prompt,
        "sampler": look.sampler,
        "sampling_steps": look.steps,
        "guidance": look.guidance,
    }


def choices_of(given: dict[str, Any]) -> Choices:
    """What was answered.

    Raises:
        UserError: for an answer that makes no sense.
    """
    for name, label in (("seed", "Seed"), ("sampling_steps", "Sampling steps"), ("guidance", "Guidance")):
        if given[name] is None:
            raise UserError("is empty", label, "Type a number.")
    look = Look(
        given["negative_prompt"] or "", int(given["sampling_steps"]), float(given["guidance"]), given["sampler"]
    )
    return Choices(
        steps=tuple(sorted(given["steps"])),
        strengths=read_strengths(given["strengths"]),
        prompt=given["prompt"] or "",
        leak=given["leak"],
        seed=int(given["seed"]),
        second_seed=given["second_seed"],
        look=look,
        scored=given["scored"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# how long it takes


def seconds_each(run: RunFolder, files: Iterable[Path], story: Story) -> float | None:
    """How long a picture took in the last drawing, or else among the run's previews; None if nothing was drawn yet."""
    order = order_file(run)
    if order.is_file():
        began = order.stat().st_mtime
        times = sorted(time for file in files if file.is_file() and (time := file.stat().st_mtime) > began)
        if len(times) > 1:
            return (times[-1] - times[0]) / (len(times) - 1)
    return next(iter(story.picture_seconds), None)

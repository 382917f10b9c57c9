"""What a run draws that nobody asked for: how much of its style comes without the trigger, and what comes with it; as a
value, and as the JSON file beside the run's walls. Without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ...datasets.captions import has_word, with_trigger
from ..errors import Problem, UserError
from ..files import write_text
from ..jobs import RunFolder, saved_step
from ..jsonfile import read_json
from ..painting.orders import Cell, Look, WallOrder

PROMPTS = 8
"""Neutral prompts that are drawn if none are given."""


@dataclass(frozen=True)
class LeakPicture:
    """A neutral prompt; styles are on the scale from the base's picture, 0, to the training images, 1."""

    prompt: str
    with_trigger: str
    """The prompt with the trigger."""
    style_without: float
    """Of what was trained, without the trigger."""
    style_with: float
    style_word: float
    """Of the untouched base, with the trigger: what the word means to it by itself."""
    towards: str
    """The training image that the picture without the trigger has come nearer to than to any other."""


@dataclass(frozen=True)
class Uninvited:
    """A word of captions whose images the pictures without the trigger have come nearer to than to the others."""

    word: str
    images: int
    """Whose captions hold it."""
    deviations: float
    """Beyond what as many images drawn by lot would show."""


@dataclass(frozen=True)
class Unnamed:
    """Images that look alike in what stands where, and whose captions share no word that says what it is."""

    images: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Captions:
    """What the captions leave unsaid."""

    everywhere: tuple[str, ...]
    """Words of every caption: what they name cannot be told from the style."""
    empty_of_words: tuple[str, ...]
    """Images whose captions have no other words than these."""
    unnamed: tuple[Unnamed, ...]
    """Those that look most alike first."""


@dataclass(frozen=True)
class Leaks:
    """What was found of one checkpoint at one strength."""

    step: int
    strength: float
    trigger: str
    seed: int
    without: float
    """Mean style without the trigger."""
    with_trigger: float
    word: float
    """Mean style of the untouched base with the trigger."""
    leak: float | None
    """`without` / `with_trigger`: 0 nothing leaks, 1 all of it; None if that cannot be told."""
    error: float | None
    """Standard error of `leak`, from prompt to prompt; None of a single one."""
    sentence: str
    pictures: tuple[LeakPicture, ...]
    uninvited: tuple[Uninvited, ...]
    words: int
    """Words that were looked at for these."""
    captions: Captions
    images: int
    """Training images that were looked at."""


def leak_order(
    run: RunFolder, step: int | None, strength: float, prompts: Sequence[str], seed: int | None = None
) -> WallOrder:
    """The four pictures of each prompt: base and trained, each without and with the trigger, on the same noise.

    Raises:
        RunError: if there is no such checkpoint.
        UserError: if the run has no trigger, a prompt holds it, or the strength is none.
    """
    config = run.read_config()
    if not config.trigger:
        what = (
            "has no trigger, so that nothing says when its style is wanted, and all that it draws is meant to have it"
        )
        raise UserError(what, str(run.path), "Draw neutral prompts with lorasmith compare, and look at them.")
    problems = [
        Problem("--prompt", f"{prompt!r} holds the trigger, {config.trigger}", "Leave it out: it is put there itself.")
        for prompt in prompts
        if has_word(prompt, config.trigger)
    ]
    if not strength:
        problems.append(Problem("--strength", "at 0 nothing of what was trained acts", "Give another, such as 1."))
    if problems:
        raise UserError.of(problems)
    texts = dict.fromkeys([*prompts, *(with_trigger(prompt, config.trigger) for prompt in prompts)])
    return WallOrder(
        run=str(run.path),
        steps=(saved_step(run, step),),
        strengths=(0.0, float(strength)),
        prompts=tuple(texts),
        seeds=(config.sample.seed if seed is None else seed,),
        look=Look.of(config.sample),
    )


def leak_cells(order: WallOrder, prompt: str, triggered: str) -> tuple[Cell, Cell, Cell, Cell]:
    """Base and trained, then both with the trigger."""
    [step], (_, strength), [seed] = order.steps, order.strengths, order.seeds
    return (
        Cell(0, 0.0, prompt, seed),
        Cell(step, strength, prompt, seed),
        Cell(0, 0.0, triggered, seed),
        Cell(step, strength, triggered, seed),
    )


# ---------------------------------------------------------------------------------------------------------------------

_LEAKS = TypeAdapter(Leaks)


def leaks_file(order: WallOrder) -> Path:
    """Where what is found is kept, under a name made of all pictures that were looked at."""
    sheet = order.sheet()
    return sheet.with_name(sheet.name.replace("wall-", "leaks-", 1)).with_suffix(".json")


def write_leaks(leaks: Leaks, file: Path) -> None:
    write_text(file, json.dumps(asdict(leaks), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_leaks(file: Path) -> Leaks | None:
    """None for a file that is not there, or holds something else."""
    try:
        return _LEAKS.validate_python(read_json(file))
    except (OSError, ValueError, ValidationError):
        return None

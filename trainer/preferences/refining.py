"""From ratings to a run that refines: the rated pictures as a folder of images, and the configuration for it.

The folder lies beside the ratings, under a name made of all that is in it, so that the run can be resumed whatever is
rated, drawn or removed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ...datasets.captions import has_word, tidy
from ..config import ObjectiveSection, OptimizerSection, RunConfig, ValidationSection
from ..errors import Problem, UserError
from ..files import atomic_folder, sha256_of, write_text
from ..idle import RATE_FREE
from ..jobs import RunFolder, free_name, saved_step
from .rated import BETTER, DOWN, UP, WORSE
from .ratings import Pair, Rating, Ratings, Thumb, prompt_in

RATE = 0.2
"""Of the learning rate of the run that is refined."""
SHOWS = 5
"""How often each pair or thumb is shown, if `budget.images` is not given."""
MOST_SHOWN = 4000
_SAVED = 4
"""Checkpoints on the way."""
_KEPT_OBJECTIVE = {
    *("prediction", "zero_terminal_snr", "min_timestep", "max_timestep"),
    *("timesteps", "timestep_mean", "timestep_std"),
}
_WITH_TRIGGER, _WITHOUT = "with-trigger", "without-trigger"
_DRAW_MORE = "Rate pictures on the Compare page, or write a file of ratings as docs/refine.md has it."


@dataclass(frozen=True)
class Lesson:
    """A picture or two, and what is to be learned of them."""

    prompt: str
    liked: Path | None
    """The better one of a pair, or one with a thumb up."""
    disliked: Path | None

    @property
    def files(self) -> Iterator[tuple[str, Path]]:
        """Where each lies in a folder of rated pictures, and where it is now."""
        if self.liked:
            yield (BETTER if self.disliked else UP), self.liked
        if self.disliked:
            yield (WORSE if self.liked else DOWN), self.disliked


def lessons_of(ratings: Ratings) -> list[Lesson]:
    """What there is to learn. A thumb up and one down for pictures of one prompt and size are a pair.

    Raises:
        UserError: with every line, picture or prompt that is wrong; or if nothing was said.
    """
    problems: list[Problem] = []
    said: list[tuple[Rating, str]] = []
    for rating in ratings.standing():
        if isinstance(rating, Pair | Thumb):
            prompt = _prompt_of(ratings, rating)
            said += [(rating, prompt)] if isinstance(prompt, str) else []
            problems += [prompt] if isinstance(prompt, Problem) else []
    if problems:
        raise UserError.of(problems)
    if not said:
        raise UserError("holds no pair and no thumb, so that there is nothing to learn", str(ratings.file), _DRAW_MORE)
    pairs = [
        Lesson(prompt, ratings.path_of(rating.better), ratings.path_of(rating.worse))
        for rating, prompt in said
        if isinstance(rating, Pair)
    ]
    thumbs = [(rating, prompt) for rating, prompt in said if isinstance(rating, Thumb)]
    up, down = (
        [(ratings.path_of(thumb.picture), prompt) for thumb, prompt in thumbs if thumb.up == liked]
        for liked in (True, False)
    )
    return [*pairs, *_together(up, down)]


def _together(up: Sequence[tuple[Path, str]], down: Sequence[tuple[Path, str]]) -> Iterator[Lesson]:
    """Thumbs, each liked picture with one of the same prompt and size that is not, as long as there are such."""
    left = {file: (prompt, _size(file)) for file, prompt in down}
    for file, prompt in up:
        alike = (prompt, _size(file))
        other = next((one for one, kind in left.items() if kind == alike), None)
        if other is not None:
            del left[other]
        yield Lesson(prompt, file, other)
    yield from (Lesson(prompt, None, file) for file, (prompt, _) in left.items())


def _prompt_of(ratings: Ratings, rating: Pair | Thumb) -> str | Problem:
    """As the line says, or else as its pictures do; or what is wrong with these."""
    prompts: list[str] = []
    for name in rating.pictures:
        file = ratings.path_of(name)
        if not _size(file):
            return Problem(str(file), "was rated, and is no picture that can be read", "Put it back, or rate others.")
        prompt = rating.prompt if rating.prompt is not None else prompt_in(file)
        if prompt is None:
            fix = f'Add "prompt" to its line in {ratings.file}.'
            return Problem(str(file), "does not tell its prompt, and neither does its rating", fix)
        prompts.append(tidy(prompt))
    if len(set(prompts)) > 1:
        what = f"was compared with {rating.pictures[1]}, which has another prompt"
        return Problem(str(ratings.path_of(rating.pictures[0])), what, "Compare pictures of one prompt.")
    return prompts[0]


def _size(file: Path) -> tuple[int, int] | None:
    try:
        with Image.open(file) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def write_lessons(lessons: Sequence[Lesson], folder: Path, trigger: str = "") -> Path:
    """Copy the pictures into a new folder below `folder`, those of prompts with the trigger apart from others, each
    with its prompt as its caption; of the same lessons it is there already. Returns it."""
    told = [[lesson.prompt, *((place, sha256_of(file)) for place, file in lesson.files)] for lesson in lessons]
    name = hashlib.sha256(json.dumps([trigger, told]).encode()).hexdigest()[:16]
    target = folder / f"rated-{name}"
    if target.is_dir():
        return target
    with atomic_folder(target) as temporary:
        for number, lesson in enumerate(lessons):
            part = temporary / (_WITH_TRIGGER if trigger and has_word(lesson.prompt, trigger) else _WITHOUT)
            for place, file in lesson.files:
                copy = part / place / f"{number:05d}{file.suffix.lower()}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                write_text(copy.with_suffix(".txt"), lesson.prompt + "\n")
    return target


# ---------------------------------------------------------------------------------------------------------------------
# the configuration


def refined(run: RunFolder, ratings: Ratings, name: str = "", step: int | None = None) -> dict[str, Any]:
    """The configuration of a new run that trains a checkpoint further by ratings: by default the one that was chosen,
    or the newest.

    Raises:
        RunError: if there is no such checkpoint.
        UserError: if the ratings cannot be learned from.
    """
    before, chosen = run.read_config(), run.chosen
    step = saved_step(run, step if step is not None or chosen is None else chosen.step)
    lessons = lessons_of(ratings)
    folder = write_lessons(lessons, run.path / "ratings", before.trigger)
    values = before.model_dump()
    batch = max(1, before.budget.batch // 2)  # a pair takes the memory of two images
    images = min(SHOWS * len(lessons), MOST_SHOWN)
    every = max(1, images // (batch * before.budget.accumulate * _SAVED))
    values |= {
        "name": name or free_name(run.path.parent, f"{run.name}-refined"),
        "runs": str(run.path.parent),
        "recipe": "",
        "data": list(_data_of(folder, before)),
        "budget": {"images": images, "batch": batch, "accumulate": before.budget.accumulate},
        "optimizer": values["optimizer"] | _slower(before.optimizer),
        "objective": ObjectiveSection().model_dump()
        | {"weighting": "none"}
        | {key: value for key, value in values["objective"].items() if key in _KEPT_OBJECTIVE},
        "preference": {"start": str(run.checkpoint(step))},
        "validation": ValidationSection().model_dump(),
        "save": values["save"] | {"every": every, "keep_best": False},
        "sample": values["sample"] | {"every": every if before.sample.every else 0},
        "export": values["export"] | {"checkpoint": "last"},
    }
    values["adapter"] |= {"start_from": "", "dropout": 0.0, "rank_dropout": 0.0, "module_dropout": 0.0}
    if before.adapter.init not in ("pissa", "olora"):
        values["adapter"]["init"] = "default"
    for block in values["block"]:
        block["lr"] *= RATE
    return values


def _slower(optimizer: OptimizerSection) -> dict[str, float]:
    """Learning rates; of an optimizer that finds its own, what it was given."""
    if optimizer.kind in RATE_FREE:
        return {}
    slower = {key: getattr(optimizer, key) * RATE for key in ("lr", "text_encoder_lr")}
    is_given = optimizer.token_lr != OptimizerSection.model_fields["token_lr"].default
    return slower | ({"token_lr": optimizer.token_lr * RATE} if is_given else {})


def _data_of(folder: Path, before: RunConfig) -> Iterator[dict[str, Any]]:
    """A table for each part of a folder of lessons."""
    for part, trigger in ((_WITH_TRIGGER, before.trigger), (_WITHOUT, "")):
        if (folder / part).is_dir():
            yield {"path": str(folder / part), "trigger": trigger, "caption_dropout": 0.0}

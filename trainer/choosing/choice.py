"""The scores of a wall and the cell they recommend, as a value and as the JSON file beside the wall; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter, ValidationError

from ..files import write_text
from ..jsonfile import read_json
from ..painting.orders import WallOrder

NULL_CAPTIONS = 24
"""Captions that the base draws at most, besides a wall's prompts, to see what it does that copies nothing."""
MOST_CONTENDERS = 8
"""Cells that draw captions as well."""
CAPTIONS = 12
"""That each of them draws at most."""
MEANINGS = (
    ("style", "0: the base's own pictures; 1: as near to the training images as these are to each other."),
    ("prompt", "1: what the base draws for the same prompt and noise, but for its look; 0: something else."),
    (
        "copying",
        "0: as near to one training image as pictures are that copy nothing; above 1: nearer than 99 % of these.",
    ),
)
"""Of the three scores, for who has not heard of them."""


@dataclass(frozen=True)
class Scores:
    """What stands for a picture, or is the mean of several."""

    style: float
    """0: as the base draws; 1: as near to the training images as these are to each other."""
    prompt: float
    """1: the base's picture for the same prompt and noise, but for its look; 0: no more like it than any other."""
    copying: float
    """0: as near to a single training image as pictures usually are that copy nothing; above 1: as 1 % of them."""

    @classmethod
    def mean(cls, scores: Iterable[Scores]) -> Scores:
        each = list(scores)
        return cls(*(fmean(getattr(one, name) for one in each) for name in ("style", "prompt", "copying")))

    @property
    def lines(self) -> list[str]:
        """Each with its name; never -0.00."""
        return [f"style {self.style:z.2f}", f"prompt {self.prompt:z.2f}", f"copying {self.copying:z.2f}"]

    def __str__(self) -> str:
        return ", ".join(self.lines)


@dataclass(frozen=True)
class JudgedPicture:
    prompt: str
    seed: int
    scores: Scores
    nearest: str
    """The file of the training image that it is nearest to, without its folder."""


@dataclass(frozen=True)
class JudgedCell:
    """A checkpoint at a strength, over all prompts and seeds."""

    step: int
    strength: float
    scores: Scores
    """The mean over its pictures."""
    pictures: tuple[JudgedPicture, ...]
    likeness: tuple[float, ...] = ()
    """Of its pictures of some training captions, how near they come to the images that have them: 0 as the base's, 1
    the same. Empty where that was not looked at."""

    @property
    def title(self) -> str:
        return f"step {self.step} at strength {self.strength:g}"


@dataclass(frozen=True)
class Recommended:
    step: int
    strength: float


@dataclass(frozen=True)
class Choice:
    """What the scores say of a wall."""

    cells: tuple[JudgedCell, ...]
    recommended: Recommended | None
    """None if no cell can be recommended; the reason then says why."""
    reason: str
    """In one sentence."""
    is_overfitted: bool
    """Whether what was trained longest copies training images at strength 1."""
    images: int
    """Training images that were looked at."""
    images_of: int
    """Of so many."""
    base_pictures: int
    """Pictures of the base that the scales were made from."""
    is_leak: bool = False
    """Whether no prompt holds the trigger of the run: the style that is gained has leaked."""

    def cell(self, step: int, strength: float) -> JudgedCell:
        return next(cell for cell in self.cells if (cell.step, cell.strength) == (step, strength))


_CHOICE = TypeAdapter(Choice)


def most_of_captions(order: WallOrder) -> int:
    """Pictures of training captions that scores take at most, of the base and of the cells that may be the best."""
    cells = min(MOST_CONTENDERS, len(order.steps) * sum(strength != 0 for strength in order.strengths))
    return NULL_CAPTIONS + (cells * CAPTIONS if cells > 1 else 0)


def choice_file(order: WallOrder) -> Path:
    """Where what is said of a wall is kept."""
    return order.sheet().with_suffix(".json")


def write_choice(choice: Choice, file: Path) -> None:
    write_text(file, json.dumps(asdict(choice), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_choice(order: WallOrder) -> Choice | None:
    """What was said of a wall; None if nothing was yet, of exactly these checkpoints, strengths, prompts and seeds."""
    try:
        return _CHOICE.validate_python(read_json(choice_file(order)))
    except (OSError, ValueError, ValidationError):
        return None

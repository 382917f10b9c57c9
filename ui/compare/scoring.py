"""What the scores say of a wall that is shown, in words, and which pictures they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...trainer.choosing.choice import MEANINGS, Choice, read_choice
from ...trainer.choosing.page import looked_at, notes_of
from ...trainer.painting.orders import WallOrder
from ...trainer.painting.sheet import Notes
from ...trainer.status import duration
from ..html import esc
from .drawing import pictures


def choice_of(order: WallOrder) -> Choice | None:
    """None if scores are not wanted, or not there."""
    return read_choice(order.judged()) if order.scored_with is not None else None


def further_files(order: WallOrder) -> list[Path]:
    """The pictures that are drawn for the scores of a wall alone, but for those of training captions, of the base and
    of the best cells."""
    judged = order.judged()
    return list({*judged.files().values(), *judged.of_the_base().files().values()} - {*order.files().values()})


def summary_of(
    files: Sequence[Path], each: float | None, further: Sequence[Path] | None = None, captions: int = 0
) -> str:
    """How much there is to draw, and how long it may take at so many seconds each; `further` are the pictures for
    scores, None if these are not wanted or there already, and `captions` so many at most of training captions."""
    missing, there = _missing(files), len(files) - _missing(files)
    if further is not None:
        return _summary_with_scores(len(files), missing, _missing(further), captions, each)
    if not missing:
        return f"<p>All {pictures(there)} of this wall are there.</p>"
    time = f", about {_time(missing, each)}" if each else ""
    already = f" {pictures(there)} of this wall are there already." if there else ""
    return f"<p>{pictures(missing)} to draw{time}.{already}</p>"


def _summary_with_scores(count: int, missing: int, besides: int, captions: int, each: float | None) -> str:
    wall = f"{pictures(missing)} to draw" if missing else f"All {pictures(count)} of this wall are there"
    most = f"up to {captions} of training captions"
    scores = f"{pictures(besides)} and {most}" if besides else most
    time = f": at most about {_time(missing + besides + captions, each)}" if each else ""
    return f"<p>{wall}; for the scores {scores}{time}.</p>"


def _missing(files: Sequence[Path]) -> int:
    return sum(not file.is_file() for file in files)


def _time(count: int, each: float) -> str:
    return duration(max(each * count, 1))


def verdict_of(choice: Choice, chosen: tuple[int, float] | None) -> str:
    """Which cell is recommended, and why."""
    best = choice.recommended
    done = " It is chosen." if best and (best.step, best.strength) == chosen else ""
    return f"<p>{esc(choice.reason)}{done}</p>"


def legend_of(choice: Choice) -> str:
    """What the three numbers mean, and what they were made from."""
    meanings = " ".join(f"<strong>{name}</strong> {esc(meaning)}" for name, meaning in MEANINGS)
    count = _pictures_each(choice)
    leak = "Without the trigger, what is gained of the style is what leaks. " if choice.is_leak else ""
    means = f"Each number is the mean of {pictures(count)}; point at a cell for its own. " if count > 1 else ""
    return f'<p class="quiet">{meanings} {leak}{means}{esc(looked_at(choice))}</p>'


def notes_on(order: WallOrder) -> Notes | None:
    """What is said of a wall that is saved as one picture."""
    choice = choice_of(order)
    if choice is None:
        return None
    notes, count = notes_of(choice), _pictures_each(choice)
    means = f" It goes by the means of {pictures(count)} a cell; below each picture are its own scores."
    return replace(notes, about=notes.about + means) if count > 1 else notes


def _pictures_each(choice: Choice) -> int:
    return len(choice.cells[0].pictures)

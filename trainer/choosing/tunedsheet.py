"""What a search of strengths has changed, as one picture: the base, where it started, and what came out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..painting.orders import WallOrder
from ..sample import contact_sheet
from .mixture import name_of
from .tuned import Tuned
from .tuning import Task

_SIDE = 160  # pixels


def tuned_sheet(task: Task, tuned: Tuned) -> Image.Image:
    """A row for each prompt and seed, those of the other noise below."""
    shown = list(_rows(task, tuned))
    pictures, labels = [picture for picture, _ in shown], [label for _, label in shown]
    columns = len(_columns(tuned))
    return contact_sheet(pictures, labels, f"{task.run.name}: strengths by block", columns, _SIDE)


def tuned_file(task: Task) -> Path:
    """Where what was found is kept: a name made of all that the search starts with."""
    files = task.start.files(task.order, task.cells).values()
    return task.run.path / "compare" / f"tuned-{name_of([[file.stem for file in files], task.rank])}.json"


def _columns(tuned: Tuned) -> list[str]:
    return ["the base", "the start", "what looked best"] if tuned.verdict.confirmed else ["the base", "the start"]


def _rows(task: Task, tuned: Tuned) -> Iterator[tuple[Image.Image, str]]:
    confirmed = tuned.verdict.confirmed
    for order in (task.order, task.others) if confirmed else (task.order,):
        yield from _rows_of(order, task, tuned)


def _rows_of(order: WallOrder, task: Task, tuned: Tuned) -> Iterator[tuple[Image.Image, str]]:
    confirmed = tuned.verdict.confirmed
    mixtures = [one.mixture for one in confirmed] if confirmed else [task.start]
    cells = order.cells()
    columns = [order.of_the_base().files(), *(one.files(order, cells, task.rank) for one in mixtures)]
    for cell, *row in zip(cells, *(files.values() for files in columns), strict=True):
        for file, name in zip(row, _columns(tuned), strict=True):
            with Image.open(file) as picture:
                yield picture.convert("RGB"), f"{name}, {cell.prompt}, seed {cell.seed}"

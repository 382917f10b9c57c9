"""The wall as one picture: a row for each checkpoint, a column for each strength, both with their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from ..files import atomic_file
from .lettering import Font, drawable, font_for, wrapped
from .orders import Cell, WallOrder

_INK, _GREY, _GROUND, _EMPTY, _GOOD = "#1d1d1f", "#5f5f64", "#ffffff", "#e3e3e6", "#1a7f37"
_MARGIN, _GAP, _LINE = 16, 4, 1.35
_TITLE, _TEXT, _LABEL, _NOTE = 24, 16, 15, 13  # sizes of letters, in pixels
_SIDES = 128, 512  # smallest and largest side of a picture on the sheet, in pixels
_NARROWEST = 480  # a title needs some room


@dataclass(frozen=True)
class Notes:
    """What is said on a wall besides its names."""

    about: str = ""
    """Below the title."""
    cells: Mapping[Cell, tuple[str, ...]] = field(default_factory=dict)
    """Lines below a picture; each as many, or none."""
    marked: tuple[int, float] | None = None
    """A checkpoint and a strength that have a frame."""

    @property
    def lines(self) -> int:
        return max(map(len, self.cells.values()), default=0)


def order_sheet(order: WallOrder, title: str, notes: Notes | None = None) -> Image.Image:
    """The walls of all prompts and seeds of an order, one below the other."""
    notes = notes or Notes()
    walls = [_wall(order, prompt, seed, notes) for prompt in order.prompts for seed in order.seeds]
    return _under_a_title(title, notes.about, walls)


def save_sheet(sheet: Image.Image, file: Path) -> None:
    """Write it as a PNG, whole or not at all."""
    with atomic_file(file) as temporary:
        sheet.save(temporary, "PNG")


@dataclass(frozen=True)
class _Writing:
    """Lines of text, of which none is wider than its place."""

    lines: list[str]
    font: Font
    size: int

    @classmethod
    def of(cls, text: str, size: int, width: float) -> _Writing:
        font = font_for(text, size)
        return cls(wrapped(drawable(text, font), font, width), font, size)

    @property
    def height(self) -> int:
        return round(len(self.lines) * self.size * _LINE)

    @property
    def width(self) -> float:
        return max(map(self.font.getlength, self.lines))

    def draw(self, pen: ImageDraw.ImageDraw, left: float, top: float, colour: str, centred: bool = False) -> None:
        for number, line in enumerate(self.lines):
            place = left, top + number * self.size * _LINE
            pen.text(place, line, colour, font=self.font, anchor="ma" if centred else "la")


def _under_a_title(title: str, about: str, walls: Sequence[Image.Image]) -> Image.Image:
    width = max(wall.width for wall in walls)
    heading = _Writing.of(title, _TITLE, width - 2 * _MARGIN)
    told = _Writing.of(about, _TEXT, width - 2 * _MARGIN)
    top = _MARGIN + heading.height + (told.height + _MARGIN if about else 0)
    sheet = Image.new("RGB", (width, top + sum(wall.height for wall in walls)), _GROUND)
    heading.draw(ImageDraw.Draw(sheet), _MARGIN, _MARGIN, _INK)
    told.draw(ImageDraw.Draw(sheet), _MARGIN, _MARGIN + heading.height, _INK)
    for wall in walls:
        sheet.paste(wall, (0, top))
        top += wall.height
    return sheet


def _wall(order: WallOrder, prompt: str, seed: int, notes: Notes) -> Image.Image:
    side = _side(order, prompt, seed)
    high = side + round(notes.lines * _NOTE * _LINE) + _GAP
    rows = [_Writing.of(f"step {step}", _LABEL, 2 * side) for step in order.steps]
    columns = [_Writing.of(_column(strength), _LABEL, side) for strength in order.strengths]

    left = _MARGIN + round(max(row.width for row in rows)) + 3 * _GAP
    width = max(left + len(columns) * (side + _GAP) + _MARGIN, _NARROWEST)
    about = _Writing.of(f"{prompt or '(no prompt)'}", _TEXT, width - 2 * _MARGIN)
    seeded = _Writing.of(f"seed {seed}", _LABEL, width - 2 * _MARGIN)
    head = _GAP + about.height + seeded.height + 2 * _GAP
    top = head + max(column.height for column in columns) + _GAP
    wall = Image.new("RGB", (width, top + len(rows) * high + _MARGIN), _GROUND)

    pen = ImageDraw.Draw(wall)
    about.draw(pen, _MARGIN, _GAP, _INK)
    seeded.draw(pen, _MARGIN, _GAP + about.height, _GREY)
    for number, column in enumerate(columns):
        column.draw(pen, left + number * (side + _GAP) + side / 2, head, _INK, centred=True)
    for number, (step, row) in enumerate(zip(order.steps, rows, strict=True)):
        y = top + number * high
        row.draw(pen, _MARGIN, y + (side - row.height) / 2, _INK)
        for place, strength in enumerate(order.strengths):
            cell = Cell(step if strength else 0, float(strength), prompt, seed)
            x = left + place * (side + _GAP)
            wall.paste(_picture(order.file(cell), side), (x, y))
            is_marked = (step, float(strength)) == notes.marked
            frame = (x - 1, y - 1, x + side, y + high - _GAP)
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline=_EMPTY)  # many pictures have a white ground
            for line, text in enumerate(notes.cells.get(cell, ())):
                note = _Writing.of(text, _NOTE, side)
                note.draw(pen, x + side / 2, y + side + line * _NOTE * _LINE, _INK, centred=True)
            if is_marked:
                pen.rectangle(frame, outline=_GOOD, width=3)
    return wall


def _column(strength: float) -> str:
    return f"strength {strength:g}" if strength else "strength 0, the base alone"


def _side(order: WallOrder, prompt: str, seed: int) -> int:
    """That of the pictures as they were drawn, within bounds; a small one is shown larger, so that labels fit."""
    files = (order.file(cell) for cell in order.cells() if (cell.prompt, cell.seed) == (prompt, seed))
    drawn = next((file for file in files if file.is_file()), None)
    if drawn is None:
        return 256
    with Image.open(drawn) as picture:
        return min(max(picture.width, _SIDES[0]), _SIDES[1])


def _picture(file: Path, side: int) -> Image.Image:
    if not file.is_file():
        return Image.new("RGB", (side, side), _EMPTY)
    with Image.open(file) as picture:
        return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)

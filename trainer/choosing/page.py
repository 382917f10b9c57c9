"""A wall with its scores as pictures: one HTML page that needs nothing else, and one PNG."""

from __future__ import annotations

from html import escape
from pathlib import Path

from PIL import Image

from ..painting.orders import Cell, WallOrder
from ..painting.sheet import Notes
from ..sharing.pictures import data_uri
from .choice import MEANINGS, Choice, JudgedCell, Scores

_CSS = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1d1d1f; background: #fff; margin: 2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.reason { font-size: 1.1rem; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 6px 10px; text-align: center; font-weight: 400; vertical-align: top; }
thead th, tbody th { color: #5f5f64; }
tbody th { text-align: right; vertical-align: middle; white-space: nowrap; }
td img { width: 160px; image-rendering: auto; border: 1px solid #e3e3e6; display: block; margin: 0 auto 4px; }
td.recommended { outline: 3px solid #1a7f37; outline-offset: -3px; }
td.recommended strong { color: #1a7f37; display: block; }
.scores { font-size: 0.85rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.above { color: #b42318; }
dt { font-weight: 600; } dd { margin: 0 0 0.6rem; max-width: 60rem; }
"""


def notes_of(choice: Choice) -> Notes:
    """What the PNG says: below each picture its own scores, in a frame what is recommended."""
    cells = {
        Cell(cell.step, cell.strength, one.prompt, one.seed): tuple(one.scores.lines)
        for cell in choice.cells
        for one in cell.pictures
    }
    best = choice.recommended
    return Notes(choice.reason, cells, (best.step, best.strength) if best else None)


def page_of(order: WallOrder, title: str, choice: Choice) -> str:
    """The whole page, with its pictures in it."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: which checkpoint, which strength</title><style>{_CSS}</style></head><body>"
        f'<h1>{escape(title)}: which checkpoint, which strength</h1><p class="reason">{escape(choice.reason)}</p>'
        f"{summary(order, choice)}{walls(order, choice)}<h2>What the numbers mean</h2>{meanings()}"
        f"<p>{escape(looked_at(choice))}</p></body></html>\n"
    )


def looked_at(choice: Choice) -> str:
    some = f"{choice.images} of the {choice.images_of}" if choice.images < choice.images_of else f"the {choice.images}"
    return f"Compared with {some} training images and {choice.base_pictures} pictures of the base alone."


def meanings() -> str:
    """What each score says, as a list."""
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{escape(meaning)}</dd>' for name, meaning in MEANINGS)}</dl>"


def walls(order: WallOrder, choice: Choice) -> str:
    """A table of pictures with their scores for each prompt and seed."""
    return "".join(_wall(order, prompt, seed, choice) for prompt in order.prompts for seed in order.seeds)


def summary(order: WallOrder, choice: Choice) -> str:
    """A table of the mean scores of each checkpoint at each strength."""
    count = len(order.prompts) * len(order.seeds)
    rows = "".join(
        f'<tr><th scope="row">step {step}</th>'
        + "".join(_td(choice, choice.cell(step, at), "", choice.cell(step, at).scores) for at in _strengths(order))
        + "</tr>"
        for step in order.steps
    )
    return _table(f"All pictures: means of {count}", _strengths(order), rows)


def _wall(order: WallOrder, prompt: str, seed: int, choice: Choice) -> str:
    rows = "".join(
        f'<tr><th scope="row">step {step}</th>'
        + "".join(_picture_td(order, choice, step, at, prompt, seed) for at in order.strengths)
        + "</tr>"
        for step in order.steps
    )
    return _table(f"{prompt or '(no prompt)'}, seed {seed}", order.strengths, rows)


def _table(title: str, strengths: tuple[float, ...], rows: str) -> str:
    heads = "".join(f'<th scope="col">strength {at:g}{"" if at else ", the base alone"}</th>' for at in strengths)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _picture_td(order: WallOrder, choice: Choice, step: int, at: float, prompt: str, seed: int) -> str:
    image = _image(order.file(Cell(step if at else 0, at, prompt, seed)), f"{prompt}, step {step} at {at:g}")
    if not at:
        return f"<td>{image}</td>"
    cell = choice.cell(step, at)
    own = next(one for one in cell.pictures if (one.prompt, one.seed) == (prompt, seed))
    return _td(choice, cell, image, own.scores, f"Nearest training image: {own.nearest}")


def _td(choice: Choice, cell: JudgedCell, image: str, scores: Scores, told: str = "") -> str:
    best = choice.recommended
    is_best = best is not None and (cell.step, cell.strength) == (best.step, best.strength)
    lines = "<br>".join(
        f'<span class="above">{line}</span>' if name == "copying" and scores.copying > 1 else line
        for name, line in zip(("style", "prompt", "copying"), scores.lines, strict=True)
    )
    mark, kind = ("<strong>recommended</strong>", ' class="recommended"') if is_best else ("", "")
    return f'<td{kind} title="{escape(told)}">{image}{mark}<span class="scores">{lines}</span></td>'


def _strengths(order: WallOrder) -> tuple[float, ...]:
    return tuple(at for at in order.strengths if at)


def _image(file: Path, told: str) -> str:
    with Image.open(file) as picture:
        return f'<img src="{data_uri(picture)}" alt="{escape(told)}">'

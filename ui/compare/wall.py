"""The wall: a row of pictures for each checkpoint, a column for each strength; and two of them side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...trainer.choosing.choice import Choice, JudgedCell, JudgedPicture
from ...trainer.choosing.recommendation import limit_of
from ...trainer.jobs import RunFolder
from ...trainer.painting.orders import Cell, WallOrder
from ..html import cell, esc, picture
from ..urls import picture_url
from .scoring import legend_of

BASE = "the base alone"
_COLUMN_NOTES = {0.0: f"{BASE}, as control", 1.0: "as trained"}
_SIDE = 160  # pixels that a picture has room for before it is loaded

CSS = """
  --side: clamp(104px, 12vw, 176px);
  caption span { display: inline-block; position: sticky; left: 0; max-width: min(100%, 70vw); }
  thead th:first-child, tbody th { position: sticky; left: 0; white-space: nowrap; background: var(--ground); }
  thead th + th { max-width: var(--side); overflow-wrap: anywhere; }
  thead th span { display: block; font-weight: 400; color: var(--quiet); }
  td .spot { width: var(--side); margin: 0 auto; }
  td .waiting { display: grid; place-items: center; height: var(--side); color: var(--quiet); }
  td a.cell { padding: 0; }
  td a.cell img { width: var(--side); min-width: 0; max-width: none; aspect-ratio: 1; }
  button.pick { width: 100%; min-height: 28px; border: 1px solid var(--line); border-radius: 4px; cursor: pointer;
    background: var(--ground); color: inherit; font-size: 0.85rem; line-height: 1.3; padding: 2px 4px; }
  button.pick:hover { border-color: currentColor; }
  td.recommended { outline: 3px dashed var(--good); outline-offset: -3px; }
  td.chosen { outline: 3px solid var(--good); outline-offset: -3px; }
  td .said { display: block; text-align: center; font-size: 0.85rem; line-height: 1.35; padding: 2px 4px; }
  td strong.said { color: var(--good); }
  td .too-much { color: var(--bad); font-weight: 600; }
  .scroll + .scroll, .scroll + p { margin-top: 1rem; }
"""
"""Of the component that shows a wall; it holds for what is in it only."""

USE_BUTTON = "use-this-one"
PICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.pick');
  if (!button) return;
  trigger('select', { step: Number(button.dataset.step), strength: Number(button.dataset.strength) });
  document.querySelector('#use-this-one').focus();
});
"""
"""A button of a cell tells which cell it is of, as the `step` and `strength` of a `select` event, and goes on to the
button that is pressed next: by keyboard it is many cells away."""

KEEPS_THE_SLIDER = """
watch('value', () => {
  const slider = element.querySelector('input[type=range]');
  if (slider) slider.dispatchEvent(new Event('input', { bubbles: true }));
});
"""
"""Two other pictures are cut where the slider stands, which keeps its place."""


@dataclass(frozen=True)
class Spot:
    """A place on the wall: a checkpoint at a strength, and which picture is there."""

    step: int
    strength: float
    file: Path

    @property
    def title(self) -> str:
        return title_of(self.step, self.strength)


def title_of(step: int, strength: float) -> str:
    return f"step {step} at {strength:g}" if strength else BASE


def spots_of(order: WallOrder, prompt: str, seed: int) -> dict[tuple[int, float], Spot]:
    """By checkpoint and strength; at strength 0 all checkpoints share the picture of the base."""
    return {
        (step, strength): Spot(step, strength, order.file(Cell(step if strength else 0, strength, prompt, seed)))
        for step in order.steps
        for strength in order.strengths
    }


@dataclass(frozen=True)
class Marks:
    """What a wall says besides its names."""

    missing: str
    """The word for what is not drawn yet."""
    chosen: tuple[int, float] | None = None
    choice: Choice | None = None
    """The scores, if there are any."""

    def judged(self, spot: Spot) -> JudgedCell | None:
        """The base has no scores."""
        cells = self.choice.cells if self.choice else ()
        return next((cell for cell in cells if (cell.step, cell.strength) == (spot.step, spot.strength)), None)

    def is_recommended(self, spot: Spot) -> bool:
        best = self.choice.recommended if self.choice else None
        return best is not None and (best.step, best.strength) == (spot.step, spot.strength)


def wall(order: WallOrder, run: RunFolder, marks: Marks) -> str:
    """A table for each prompt and seed of an order, and what the numbers in them mean."""
    tables = (_table(order, run, prompt, seed, marks) for prompt in order.prompts for seed in order.seeds)
    return "".join(tables) + (legend_of(marks.choice) if marks.choice else "")


def _table(order: WallOrder, run: RunFolder, prompt: str, seed: int, marks: Marks) -> str:
    spots = spots_of(order, prompt, seed)
    head = "".join(f'<th scope="col">{_column_title(strength)}</th>' for strength in order.strengths)
    rows = "".join(
        f'<tr><th scope="row">step {step}</th>'
        + "".join(_td(spots[step, strength], run, (prompt, seed), marks) for strength in order.strengths)
        + "</tr>"
        for step in order.steps
    )
    caption = said_of(prompt, seed)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Wall with seed {seed}"><table class="grid">'
        f'<caption><span>{esc(caption)}</span></caption><thead><tr><th scope="col">Checkpoint</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def said_of(prompt: str, seed: int) -> str:
    """What all pictures of a table were asked for."""
    return f"Prompt: {prompt or '(empty)'}. Seed {seed}."


def _column_title(strength: float) -> str:
    note = _COLUMN_NOTES.get(strength, "")
    return f"Strength {strength:g}" + (f"<span>{note}</span>" if note else "")


def _td(spot: Spot, run: RunFolder, asked: tuple[str, int], marks: Marks) -> str:
    is_chosen, is_recommended = (spot.step, spot.strength) == marks.chosen, marks.is_recommended(spot)
    seen = (
        cell(picture_url(run, spot.file), spot.title, _SIDE)
        if spot.file.is_file()
        else f'<span class="waiting">{esc(marks.missing)}</span>'
    )
    kinds = " ".join(kind for kind, holds in (("chosen", is_chosen), ("recommended", is_recommended)) if holds)
    word = '<strong class="said">Recommended</strong>' if is_recommended else ""
    judged = marks.judged(spot)
    own = next((one for one in judged.pictures if (one.prompt, one.seed) == asked), None) if judged else None
    return (
        f'<td class="{kinds}"{_title(own)}><div class="spot">{seen}</div>{word}{_scores(judged)}'
        f"{_button(spot, is_chosen)}</td>"
    )


def _title(own: JudgedPicture | None) -> str:
    """What is told of a picture who points at it."""
    if own is None:
        return ""
    return f' title="{esc(f"This picture: {own.scores}. Nearest training image: {own.nearest}.")}"'


def _scores(judged: JudgedCell | None) -> str:
    """The means of a cell; what is left out because it copies says so by a word as well."""
    if judged is None:
        return ""
    style, prompt, copying = judged.scores.lines
    if judged.scores.copying > limit_of(judged):
        copying = f'<span class="too-much">{copying}, too much</span>'
    return f'<span class="said">{style}<br>{prompt}<br>{copying}</span>'


def _button(spot: Spot, is_chosen: bool) -> str:
    """Nothing can be chosen of the base, which is no result."""
    if not spot.strength:
        return ""
    return (
        f'<button type="button" class="pick" data-step="{spot.step}" data-strength="{spot.strength:g}" '
        f'aria-label="Pick {spot.title}">{"Chosen" if is_chosen else "Pick"}</button>'
    )


def pair(run: RunFolder, left: Spot, right: Spot) -> str:
    """Two pictures, one over the other, and the slider that uncovers them."""
    if unseen := [spot.title for spot in (left, right) if not spot.file.is_file()]:
        return f"<p>Not drawn yet: {esc(' and '.join(unseen))}. Draw the wall first.</p>"
    pictures = "".join(picture(picture_url(run, spot.file), spot.title) for spot in (left, right))
    label = f"How much is seen of {left.title}, in percent; the rest is {right.title}"
    return (
        f'<div class="pair"><span class="stack">{pictures}</span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{esc(label)}">'
        f"<p>Left: {esc(left.title)}. Right: {esc(right.title)}.</p></div>"
    )

"""The rule: which cell of a wall is recommended, and why, in one sentence.

1. A cell that copies is left out: it draws training images, not the style. That is where copying is above one half on
   the average of its pictures, as if every second were a copy; of fewer than four pictures above 1 / sqrt(pictures).
2. A cell that has lost its prompts, which keeps less than half of what the best cell keeps, is left out as well.
3. Of the others, those that have gained nearly the most style are equal, for the score is no finer than that.
4. Of these, those that keep their prompts nearly best are equal as well, and the one with most style is recommended.

Style beyond 1 counts as 1: to be nearer to the training images than they are to each other is no further gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choice import JudgedCell

LIMIT = 0.5
"""Of the copying score. The mean of four pictures that copy nothing is above it in 1 % of cases."""
LOST = 0.5
"""Of the prompt score of the best cell."""
NEARLY = 0.1
"""Of the style score: by about so much it depends on which four prompts are drawn."""
CLEARLY = 0.05
"""Of the prompt score, which is of the same prompts and noise in every cell."""
LITTLE = 0.25
"""Of the style score. Below it a run has hardly begun to learn."""


@dataclass(frozen=True)
class Verdict:
    cell: JudgedCell | None
    reason: str
    is_overfitted: bool


def recommend(cells: Sequence[JudgedCell], knows_style: bool = True) -> Verdict:
    """Of all cells but the base; `knows_style` is false if the base's own pictures are in the style already."""
    last = max(cells, key=lambda cell: (cell.step, -abs(cell.strength - 1)))
    copies = [cell for cell in cells if cell.scores.copying > limit_of(cell)]
    is_overfitted = last in copies
    if not knows_style:
        what = "the base's own pictures are as near to the training images as these are to each other"
        return Verdict(None, f"No cell is recommended, because {what}, so that no gain can be told.", is_overfitted)
    original = [cell for cell in cells if cell not in copies]
    if not original:
        return Verdict(None, _all_copy(cells), is_overfitted)
    enough = LOST * max(cell.scores.prompt for cell in original)
    following = [cell for cell in original if cell.scores.prompt >= enough]
    most = max(map(_style, following))
    styled = [cell for cell in following if _style(cell) >= most - NEARLY]
    kept = max(cell.scores.prompt for cell in styled)
    keeping = [cell for cell in styled if cell.scores.prompt >= kept - CLEARLY]
    best = max(keeping, key=lambda cell: (_style(cell), cell.scores.prompt, -cell.strength, -cell.step))
    return Verdict(best, _reason(best, styled, last, is_overfitted), is_overfitted)


def limit_of(cell: JudgedCell) -> float:
    """What the mean of pictures that copy nothing rarely exceeds: it spreads less the more they are."""
    return max(LIMIT, len(cell.pictures) ** -0.5)


def _style(cell: JudgedCell) -> float:
    return min(cell.scores.style, 1.0)


def _all_copy(cells: Sequence[JudgedCell]) -> str:
    least = min(cells, key=lambda cell: cell.scores.copying)
    return (
        f"No cell is recommended, because all of them draw training images (copying is {least.scores.copying:.2f} at "
        f"the least, {least.title}; the limit is {limit_of(least):.2g}): train for less long, or on more images."
    )


def _reason(best: JudgedCell, styled: Sequence[JudgedCell], last: JudgedCell, is_overfitted: bool) -> str:
    style, prompt = best.scores.style, best.scores.prompt
    said = [f"{best.title.capitalize()} is recommended: it has gained {style:.2f} of the style"]
    if len(styled) > 1:
        said.append(f"and of the {len(styled)} cells with about as much none keeps clearly more of its prompts")
    else:
        said.append("more than any other that neither copies nor loses its prompts, and keeps them")
    said[-1] += f" ({prompt:.2f})"
    if best.scores.style < LITTLE:
        said.append("which is little, so train longer or at a higher rate")
    if is_overfitted:
        said.append(f"while {last.title} draws training images (copying {last.scores.copying:.2f}): it is overfitted")
    return ", ".join(said) + "."

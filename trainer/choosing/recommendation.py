"""The rule: which cell of a wall is recommended, and why, in one sentence.

1. A cell that copies is left out: it draws training images, not the style. That is where copying is above one half on
   the average of its pictures, as if every second were a copy; of fewer than four pictures above 1 / sqrt(pictures).
2. A cell that has lost its prompts, which keeps less than a quarter of what the best cell keeps, is left out as well.
3. Of the others, those with most style draw some training captions. The one that comes nearest to the images which have
   these captions, and all that are as near but for noise, have learned best.
4. Of these the one with most style is recommended: what is learned shows less on other prompts than on captions. Of
   several with all of it the one that comes nearest.
5. A run whose last checkpoint knows its images by heart, and shows clearly less of the style elsewhere, is overfitted:
   what it learned at last is these images. Then of those with nearly the most style the one trained shortest is
   recommended.

Where no captions can be drawn, all with nearly the most style are equal, for the score is no finer than that; of these,
all that keep their prompts nearly best are, and the one with most style is recommended.

Style beyond 1 counts as 1: to be nearer to the training images than they are to each other is no further gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol, TypeVar

from .choice import MOST_CONTENDERS, JudgedCell, Scores

LIMIT = 0.5
"""Of the copying score. The mean of four pictures that copy nothing is above it in 1 % of cases."""
LOST = 0.25
"""Of the prompt score of the best cell. The true pictures of the example style keep 0.4 of what the base's keep, those
of other things 0.05."""
ABOUT_AS_NEAR = 0.01
"""Of the likeness: less makes no difference to anyone."""
BY_HEART = 0.95
"""Of the likeness: pictures of training captions are the training images."""
ELSEWHERE = 0.25
"""By so much less than the likeness is the style on other prompts where images were learned and not their style."""
NEARLY = 0.1
"""Of the style score: by about so much it depends on which four prompts are drawn."""
CLEARLY = 0.05
"""Of the prompt score, which is of the same prompts and noise in every cell."""
LITTLE = 0.25
"""Of the style score. Below it a run has hardly begun to learn."""


class Judged(Protocol):
    """What the rule chooses among: pictures of the same prompts and noise, and the mean of their scores."""

    @property
    def scores(self) -> Scores: ...

    @property
    def pictures(self) -> Sized: ...


AnyJudged = TypeVar("AnyJudged", bound=Judged)


@dataclass(frozen=True)
class Verdict:
    cell: JudgedCell | None
    reason: str
    is_overfitted: bool


def recommend(cells: Sequence[JudgedCell], knows_style: bool = True, is_leak: bool = False) -> Verdict:
    """Of all cells but the base; `knows_style` is false if the base's own pictures are in the style already, and
    `is_leak` true if no prompt asks for the style."""
    last = max(cells, key=lambda cell: (cell.step, -abs(cell.strength - 1)))
    is_overfitted = copies(last) or knows_by_heart(last)
    if not knows_style:
        what = "the base's own pictures are as near to the training images as these are to each other"
        return Verdict(None, f"No cell is recommended, because {what}, so that no gain can be told.", is_overfitted)
    if is_leak:
        return Verdict(None, _leaks(cells), is_overfitted)
    looked_at = [cell for cell in contenders(cells) if cell.likeness]
    if looked_at:
        learned = best_learned(looked_at)
        equal = trained_shortest(learned) if knows_by_heart(last) else learned
        best = max(equal, key=lambda cell: (_style(cell), fmean(cell.likeness)))
        return Verdict(best, _reason(best, _why_learned(best, learned, equal), last), is_overfitted)
    styled = with_most_style(sorted(cells, key=lambda cell: (cell.strength, cell.step)))
    if not styled:
        return Verdict(None, _all_copy(cells), is_overfitted)
    best = keeping_most(styled)
    return Verdict(best, _reason(best, _why_kept(best, styled), last), is_overfitted)


def contenders(cells: Sequence[JudgedCell]) -> list[JudgedCell]:
    """Those with most style that neither copy nor have lost their prompts; of equals those that were trained longer, at
    the strength that they were trained at."""
    nearly_as_trained = sorted(_following(cells), key=lambda cell: (-cell.step, abs(cell.strength - 1)))
    return sorted(nearly_as_trained, key=_style, reverse=True)[:MOST_CONTENDERS]


def best_learned(cells: Sequence[JudgedCell]) -> list[JudgedCell]:
    """The one that comes nearest to the training images, and all that are as near but for the standard error of the
    mean difference over the same captions."""
    nearest = max(cells, key=lambda cell: fmean(cell.likeness))
    return [cell for cell in cells if _is_about_as_near(cell, nearest)]


def _is_about_as_near(cell: JudgedCell, nearest: JudgedCell) -> bool:
    behind = [mine - theirs for mine, theirs in zip(nearest.likeness, cell.likeness, strict=True)]
    error = stdev(behind) / math.sqrt(len(behind)) if len(behind) > 1 else 0.0
    return fmean(behind) <= max(ABOUT_AS_NEAR, error)


def trained_shortest(cells: Sequence[JudgedCell]) -> list[JudgedCell]:
    """Of those with nearly the most style, those of the earliest checkpoint."""
    most = max(map(_style, cells))
    styled = [cell for cell in cells if _style(cell) >= most - NEARLY]
    first = min(cell.step for cell in styled)
    return [cell for cell in styled if cell.step == first]


def best_of(judged: Sequence[AnyJudged]) -> AnyJudged | None:
    """The one that the rule prefers, the first of equals; None if all copy."""
    styled = with_most_style(judged)
    return keeping_most(styled) if styled else None


def with_most_style(judged: Sequence[AnyJudged]) -> list[AnyJudged]:
    """Of those that neither copy nor have lost their prompts, all with nearly the most style; empty if all copy."""
    following = _following(judged)
    most = max(map(_style, following), default=0.0)
    return [one for one in following if _style(one) >= most - NEARLY]


def _following(judged: Sequence[AnyJudged]) -> list[AnyJudged]:
    """Those that neither copy nor have lost their prompts."""
    original = [one for one in judged if not copies(one)]
    enough = LOST * max((one.scores.prompt for one in original), default=0.0)
    return [one for one in original if one.scores.prompt >= enough]


def keeping_most(styled: Sequence[AnyJudged]) -> AnyJudged:
    """Of those that keep nearly most of their prompts the one with most style, the first of equals."""
    kept = max(one.scores.prompt for one in styled)
    keeping = [one for one in styled if one.scores.prompt >= kept - CLEARLY]
    return max(keeping, key=lambda one: (_style(one), one.scores.prompt))


def is_clearly_better(one: Judged, other: Judged) -> bool:
    """Whether the rule prefers one of two, by more than what makes them equal."""
    if copies(one) or copies(other):
        return not copies(one)
    gained, kept = _style(one) - _style(other), one.scores.prompt - other.scores.prompt
    return best_of([other, one]) is one and (gained > NEARLY or kept > CLEARLY)


def copies(judged: Judged) -> bool:
    return judged.scores.copying > limit_of(judged)


def knows_by_heart(cell: JudgedCell) -> bool:
    """Whether its pictures of training captions are the training images, while others have clearly less of the
    style."""
    if not cell.likeness:
        return False
    likeness = fmean(cell.likeness)
    return likeness >= BY_HEART and likeness - _style(cell) >= ELSEWHERE


def limit_of(judged: Judged) -> float:
    """What the mean of pictures that copy nothing rarely exceeds: it spreads less the more they are."""
    return max(LIMIT, len(judged.pictures) ** -0.5)


def _style(judged: Judged) -> float:
    return min(judged.scores.style, 1.0)


def _leaks(cells: Sequence[JudgedCell]) -> str:
    least, most = (choose(cells, key=lambda cell: cell.scores.style) for choose in (min, max))
    return (
        "No cell is recommended, because no prompt holds the trigger: the style that shows without it has leaked, "
        f"from {least.scores.style:.2f} of it at {least.title} to {most.scores.style:.2f} at {most.title}."
    )


def _all_copy(cells: Sequence[JudgedCell]) -> str:
    least = min(cells, key=lambda cell: cell.scores.copying)
    return (
        f"No cell is recommended, because all of them draw training images (copying is {least.scores.copying:.2f} at "
        f"the least, {least.title}; the limit is {limit_of(least):.2g}): train for less long, or on more images."
    )


def _why_learned(best: JudgedCell, learned: Sequence[JudgedCell], equal: Sequence[JudgedCell]) -> list[str]:
    """`learned` come as near as any, and of these those that are `equal` stand to be chosen."""
    near = f"its pictures of training captions come {fmean(best.likeness):.2f} of the way to the images that have them"
    told, elsewhere = "nearest of all, with", f"{best.scores.style:.2f} of the style on other prompts"
    if len(learned) > 1:
        told = f"as near as any, and of {len(learned)} such cells it has"
    if len(equal) < len(learned):
        told = f"as near as any, and of {len(learned)} such cells none was trained shorter and has about as much as its"
    return [near, f"{told} {elsewhere}"]


def _why_kept(best: JudgedCell, styled: Sequence[JudgedCell]) -> list[str]:
    said = [f"it has gained {best.scores.style:.2f} of the style"]
    if len(styled) > 1:
        said.append(f"and of the {len(styled)} cells with about as much none keeps clearly more of its prompts")
    else:
        said.append("more than any other that neither copies nor loses its prompts, and keeps them")
    said[-1] += f" ({best.scores.prompt:.2f})"
    return said


def _reason(best: JudgedCell, why: list[str], last: JudgedCell) -> str:
    said = [f"{best.title.capitalize()} is recommended: {why[0]}", *why[1:]]
    if best.scores.style < LITTLE:
        said.append("which is little, so train longer or at a higher rate")
    if copies(last):
        said.append(f"while {last.title} draws training images (copying {last.scores.copying:.2f}): it is overfitted")
    elif knows_by_heart(last):
        by_heart = f"while {last.title} knows the training images by heart ({fmean(last.likeness):.2f} of the way)"
        said.append(f"{by_heart} and has {last.scores.style:.2f} of the style elsewhere: it is overfitted")
    return ", ".join(said) + "."

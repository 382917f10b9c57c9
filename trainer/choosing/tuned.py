"""What a search of strengths has found: all that was tried, the best of it, and why; also as JSON; without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_text
from ..strengths import Strengths
from .choice import JudgedPicture, Scores
from .mixture import Mixture
from .recommendation import copies, is_clearly_better
from .search import leader


@dataclass(frozen=True)
class Tried:
    """A mixture, over all prompts and seeds."""

    mixture: Mixture
    change: float
    """How much of the start's checkpoint at strength 1 it changes of the base: a ratio of Frobenius norms over all
    layers."""
    scores: Scores
    """The mean over its pictures."""
    pictures: tuple[JudgedPicture, ...]

    @property
    def strengths(self) -> Strengths:
        return self.mixture.strengths


@dataclass(frozen=True)
class Verdict:
    best: Tried
    """What is recommended; the start, if nothing is clearly better."""
    reason: str
    """In one sentence."""
    confirmed: tuple[Tried, Tried] | None
    """The start, and what looked better than it, with other noise; None if nothing did."""


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search."""

    tried: tuple[Tried, ...]
    """The start first, then in the order in which they were tried."""
    verdict: Verdict
    command: str
    """What writes the best into files."""
    drawn: int
    """Pictures that were not there before."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def decided(tried: Sequence[Tried], confirm: Callable[[Tried], tuple[Tried, Tried]]) -> Verdict:
    """Of those that are clearly better than the first, the best must be so again with other noise: the best of many
    looks better than it is. `confirm` draws and scores that, of the first and of what it is given."""
    start = tried[0]
    better = [one for one in tried[1:] if is_clearly_better(one, start)]
    stands = f"so {start.mixture.title} stands"
    others = f"{len(tried) - 1} other{'' if len(tried) == 2 else 's'}"
    if all(map(copies, tried)):
        return Verdict(start, f"All that were tried draw training images, {stands}: train for less long.", None)
    if not better:
        return Verdict(start, f"Of {others} that were tried none is clearly better, {stands}.", None)
    best = leader(better)
    confirmed = confirm(best)
    again, changed = confirmed
    numbers = f"style {_pair(start.scores.style, best.scores.style)}, prompt "
    numbers += _pair(start.scores.prompt, best.scores.prompt)
    fresh = f"style {_pair(again.scores.style, changed.scores.style)}, prompt "
    fresh += _pair(again.scores.prompt, changed.scores.prompt)
    title = best.mixture.title
    if not is_clearly_better(changed, again):
        looked = f"{title.capitalize()} looked best of {others} ({numbers}), but not clearly with other noise ({fresh})"
        return Verdict(start, f"{looked}, {stands}.", confirmed)
    reason = f"{title.capitalize()} is better than {start.mixture.title} ({numbers}), with other noise too ({fresh})."
    return Verdict(best, reason, confirmed)


def _pair(before: float, after: float) -> str:
    return f"{before:.2f} to {after:.2f}"


def write_tuned(tuned: Tuned, file: Path) -> None:
    write_text(file, json.dumps(asdict(tuned), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

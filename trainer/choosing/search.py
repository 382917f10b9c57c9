"""Which strengths of blocks to try, and which next: coordinate descent over a few blocks and a few strengths.

From a start one block after the other is set to each strength of a grid, all others as in the best that was found until
then; blocks whole at first, then their kinds of layers apart, and again until nothing gets better. The best is that of
all that were tried, by the rule of `recommendation`, so that many small losses cannot add up to a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..paths import lies_in, path_of
from ..strengths import Strengths
from .recommendation import AnyJudged, Judged, best_of

GRID = (0.0, 0.5, 1.0)
"""The base, half way, and what was trained."""
_PLACES = ("unet.down_blocks", "unet.mid_block", "unet.up_blocks")
_KINDS = ("attn1", "attn2", "ff", "resnets")
"""Attention of a picture to itself and to the prompt, feed-forward layers, convolutions."""


class Candidate(Judged, Protocol):
    @property
    def strengths(self) -> Strengths: ...


class Layers:
    """The layers of what was trained, and the blocks of them whose strengths are searched."""

    def __init__(self, layers: Sequence[tuple[str, str]]) -> None:
        """`layers`: (component, path)."""
        self._layers = layers
        self._paths = [path_of(*layer) for layer in layers]

    @property
    def blocks(self) -> list[str]:
        """Text encoders, two as one, and the UNet's way down, middle and way up; then kinds of layers in each."""
        encoders = sorted({component for component, _ in self._layers if component.startswith("text_encoder")})
        places = [place for place in _PLACES if self._in(place)]
        kinds = [kind for place in places for kind in self._kinds(place)]
        return [*(["text_encoder*"] if len(encoders) > 1 else encoders), *places, *kinds]

    def moved(self, strengths: Strengths, block: str, at: float) -> Strengths:
        """The same with all of a block at a strength, written as shortly as can be."""
        others = tuple((name, own) for name, own in strengths.blocks if not f"{name}.".startswith(f"{block}."))
        without = Strengths(strengths.everywhere, others)
        found = Strengths(strengths.everywhere, (*others, (block, at)))
        return without if self.effect(without) == self.effect(found) else found

    def effect(self, strengths: Strengths) -> tuple[float, ...]:
        """The strength of each layer: the same for what differs in writing alone."""
        return tuple(strengths.of(*layer) for layer in self._layers)

    def _kinds(self, place: str) -> Iterator[str]:
        """Those of which a place does not consist alone."""
        for kind in _KINDS:
            for name in (f"{place}.*.{kind}", f"{place}.{kind}"):
                if 0 < len(self._in(name)) < len(self._in(place)):
                    yield name

    def _in(self, block: str) -> list[str]:
        return [path for path in self._paths if lies_in(path, block)]


def descend(
    start: Candidate, layers: Layers, attempt: Callable[[Strengths], Candidate | None], grid: Sequence[float] = GRID
) -> None:
    """Search from a start; `attempt` draws and scores what it is given, and ends the search by None. Whatever does the
    same as one before is not tried again, and the base alone never."""
    best, tried = start, [start]
    known = {layers.effect(start.strengths)}
    while True:
        before = best
        for block in layers.blocks:
            for at in grid:
                strengths = layers.moved(best.strengths, block, at)
                effect = layers.effect(strengths)
                if effect in known or not any(effect):
                    continue
                if (found := attempt(strengths)) is None:
                    return
                known.add(effect)
                tried.append(found)
            best = leader(tried)
        if best is before:
            return


def leader(tried: Sequence[AnyJudged]) -> AnyJudged:
    """The one to go on from: the best, or if all copy, the one that does so least."""
    return best_of(tried) or min(tried, key=lambda one: one.scores.copying)

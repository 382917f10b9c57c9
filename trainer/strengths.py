"""How strongly a change acts: one number, and others for some blocks (WiSE-FT, Wortsman et al. 2022, per layer group).

A strength of 0 leaves the original weights, 1 is what was trained; what lies between interpolates the two in weight
space (https://arxiv.org/abs/2109.01903), and what lies outside exaggerates the change or takes it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import UserError
from .paths import lies_in, path_of, refuse_idle


@dataclass(frozen=True)
class Strengths:
    """One number for everything, and those of blocks, of which the last that holds a layer counts for it."""

    everywhere: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()
    """(path, strength); a path as in `[[block]]`: `text_encoder`, `unet.up_blocks.1`, `unet.*.attn2`."""

    @classmethod
    def parse(cls, everywhere: float, blocks: Sequence[str] = ()) -> Strengths:
        """From a number and texts such as `unet.down_blocks=0.5`.

        Raises:
            UserError: for what is no such text, or no finite number.
        """
        if not math.isfinite(everywhere):
            raise UserError(f"{everywhere} is no strength", "--strength", "Give a number; 1 is as it was trained.")
        return cls(everywhere, tuple(_parse(text) for text in blocks))

    def of(self, component: str, layer: str) -> float:
        """The strength of a layer, by its component and dotted path."""
        path = path_of(component, layer)
        return next((value for block, value in reversed(self.blocks) if lies_in(path, block)), self.everywhere)

    def refuse_idle(self, layers: Iterable[tuple[str, str]]) -> None:
        """Every block that is named must hold one of the layers, (component, path).

        Raises:
            ConfigError: for all that do not.
        """
        if self.blocks:
            paths = [path_of(component, layer) for component, layer in layers]
            refuse_idle("--block", [block for block, _ in self.blocks], paths)

    def refuse_nothing(self, layers: Iterable[tuple[str, str]]) -> None:
        """Of these layers, (component, path), one at least must keep some of its change.

        Raises:
            UserError: if all are at strength 0.
        """
        if not any(self.of(component, layer) for component, layer in layers):
            what = "at strength 0 nothing is left of what was trained"
            raise UserError(what, "--strength", "Give a strength that is not 0, to all of it or to a --block.")

    def __str__(self) -> str:
        return ", ".join([f"{self.everywhere:g}", *(f"{value:g} in {block}" for block, value in self.blocks)])


AS_TRAINED = Strengths()


def _parse(text: str) -> tuple[str, float]:
    block, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not block or not math.isfinite(value):
        fix = "Write a block and a number, as in unet.down_blocks=0.5."
        raise UserError(f"{text!r} is no strength of a block", "--block", fix)
    return block.strip(), value

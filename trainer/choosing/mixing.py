"""Draws mixtures, and writes one into a file: a base in memory that acts as what it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter import base_weight, deltas, has_adapters, trained_layers
from ..full import original_weights, trained_weights
from ..jobs import RunFolder
from ..models import Base
from ..painting.orders import Cell, WallOrder
from ..painting.studio import Studio
from ..release import release_file
from ..run import load_run
from ..sample import Drawing, draw, save_picture
from ..soups import Interpolated, interpolate_run
from ..strengths import AS_TRAINED, Strengths
from ..verify import plain_size
from .mixture import Mixture

Sizes = Mapping[tuple[str, str], float]
"""The Frobenius norm of the change of each layer, by component and path."""


@dataclass
class Mixer:
    """One base is in memory at a time: the studio's, or that of a mean."""

    order: WallOrder
    """Whose pictures are drawn: their look counts."""
    studio: Studio
    rank: int
    """Of the plain LoRA that is made of another kind of adapter; 0: none is."""
    _mean: tuple[tuple[int, ...], Interpolated] | None = field(default=None, init=False)

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.order.run))

    def draw(self, mixture: Mixture, files: Mapping[Cell, Path], drawn: Callable[[], None]) -> None:
        """Draw those pictures that are not there, one by one as `Studio.draw` does."""
        missing = {cell: file for cell, file in files.items() if not file.is_file()}
        if not missing:
            return
        look = self.order.look
        with self._acting(mixture) as base:
            size = look.size or base.info.resolution
            for cell, file in missing.items():
                drawing = Drawing(look.negative_prompt, cell.seed, look.steps, look.guidance, size, look.sampler)
                [picture] = draw(base, [cell.prompt], drawing)
                lora = f"{self.run.name} {mixture.title.replace(' at strength ', ' at ')}"
                save_picture(file, picture, cell.prompt, drawing, base.info.short_name, lora)
                drawn()

    def layers(self, step: int) -> list[tuple[str, str]]:
        """What a strength can be given to."""
        with self._acting(Mixture((step,), AS_TRAINED)) as base:
            return list(trained_layers(base))

    def sizes(self, steps: tuple[int, ...]) -> Sizes:
        """Of a checkpoint, or of the mean of several."""
        with self._acting(Mixture(steps, AS_TRAINED)) as base:
            changes = self._mean[1].changes if self._mean else None
            if changes is not None:
                return {(part, delta.name): plain_size(delta) for part, own in changes.items() for delta in own}
            return _live_sizes(base)

    def write(self, mixture: Mixture, file: Path) -> None:
        """One file, verified.

        Raises:
            UserError: if it cannot be had at its strengths, or not as one file.
            ExportError: if the file on disk is not the same.
        """
        if mixture.is_mean:
            mean = self._mean_of(mixture.steps)
            release_file(mean.trained, file, 0, mixture.strengths, mean.changes, mean.merged_from)
        else:
            self._mean = None
            self.studio.clear()
            release_file(load_run(self.run.path, mixture.steps[0]), file, self.rank, mixture.strengths)

    @contextmanager
    def _acting(self, mixture: Mixture) -> Iterator[Base]:
        if mixture.is_mean:
            with self._mean_of(mixture.steps).at(mixture.strengths) as base:
                yield base
        else:
            self._mean = None
            self.studio.prepare(self.order)
            with self.studio.acting(self.run, mixture.steps[0], mixture.strengths) as base:
                yield base

    def _mean_of(self, steps: tuple[int, ...]) -> Interpolated:
        if self._mean is None or self._mean[0] != steps:
            self._mean = None
            self.studio.clear()
            self._mean = steps, interpolate_run(self.run.path, steps, rank=self.rank or None)
        return self._mean[1]


def share_of(sizes: Sizes, strengths: Strengths, of: Sizes) -> float:
    """How large changes of these sizes are at strengths, beside those of other sizes at 1."""
    return math.hypot(*(strengths.of(*layer) * size for layer, size in sizes.items())) / math.hypot(*of.values())


def _live_sizes(base: Base) -> Sizes:
    """That of new tokens is left out: no strength scales them."""
    if any(map(has_adapters, base.components.values())):
        return {
            (component, delta.name): plain_size(delta)
            if delta.is_plain
            else float(delta.of(base_weight(module, delta.name)).norm())
            for component, module in base.components.items()
            for delta in deltas(module)
        }
    live = trained_weights(base)
    original = original_weights(base, live)
    paths = {name: name.split(".", 1) for name in live}
    return {(part, path): float((live[name].cpu() - original[name]).norm()) for name, (part, path) in paths.items()}

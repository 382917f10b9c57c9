"""Scores a wall that is drawn: every picture against the base's own and against the training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from ...datasets.workers import Progress
from ..jobs import RunFolder
from ..painting.orders import Cell, WallOrder, files_of
from ..painting.studio import Studio
from .choice import Choice, JudgedCell, JudgedPicture, Recommended, Scores
from .content import ContentScale
from .features import Features, features_of, features_of_true
from .recommendation import recommend
from .style import StyleScale
from .training import TrainingImages, drawn_pictures, training_images

NULL_CAPTIONS = 24
"""Captions that the base draws, besides the wall's prompts, to see what it does that copies nothing."""
_AT_ONCE = 8


def orders_to_judge(order: WallOrder, images: TrainingImages) -> tuple[WallOrder, WallOrder]:
    """What has to be drawn besides a wall itself: the base's pictures of its prompts, and of training captions."""
    captions = list(dict.fromkeys(images.captions))
    stride = max(1, -(-len(captions) // NULL_CAPTIONS))
    alone = replace(order, steps=order.steps[:1], strengths=(0.0,))
    return alone, replace(alone, prompts=tuple(captions[::stride]), seeds=order.seeds[:1])


def judge_wall(order: WallOrder, studio: Studio, progress: Progress | None = None) -> Choice:
    """Draw what is missing of a wall and of what it is compared with, and score it. `progress` counts pictures drawn.

    Raises:
        UserError: if the training images are not there, or nothing of the wall was trained.
        RunError: if a checkpoint is not there, or the base has changed.
    """
    run = RunFolder(Path(order.run))
    images = training_images(run)
    orders = (order, *orders_to_judge(order, images))
    _draw(orders, studio, progress)
    studio.prepare(order)
    return _Judge.of(orders, images, studio.vae).choice()


def _draw(orders: Sequence[WallOrder], studio: Studio, progress: Progress | None) -> None:
    missing = [file for order in orders for file in set(_files(order).values()) if not file.is_file()]
    total, done = len(set(missing)), iter(range(1, len(missing) + 1))
    for order in orders:
        files = _files(order)
        if any(not file.is_file() for file in files.values()):
            studio.draw(order, files, lambda: progress(next(done), total) if progress else None)


def _files(order: WallOrder) -> dict[Cell, Path]:
    return files_of(order, Path(order.run).parent)


@dataclass(frozen=True, eq=False)
class _Judge:
    """A wall, the scales, and the base's own pictures."""

    order: WallOrder
    images: TrainingImages
    vae: AutoencoderKL
    base: Features
    """Of the wall's prompts, seed by seed within each."""
    style: StyleScale
    content: ContentScale
    base_pictures: int

    @classmethod
    def of(cls, orders: Sequence[WallOrder], images: TrainingImages, vae: AutoencoderKL) -> _Judge:
        order, alone, captioned = orders
        base = _drawn(vae, list(_files(alone).values()))
        others = _drawn(vae, list(_files(captioned).values()))
        training = _true(vae, images, _size(next(iter(_files(alone).values()))))
        everything = _together([base, others])
        asked = [cell.prompt for one in (alone, captioned) for cell in one.cells()]
        own = torch.tensor([[caption == prompt for caption in images.captions] for prompt in asked])
        style, content = StyleScale.fit(base, training), ContentScale.fit(everything, training, own)
        return cls(order, images, vae, base, style, content, len(everything))

    def choice(self) -> Choice:
        cells = tuple(self._cells())
        verdict = recommend(cells, self.style.is_known)
        best = verdict.cell
        return Choice(
            cells=cells,
            recommended=Recommended(best.step, best.strength) if best else None,
            reason=verdict.reason,
            is_overfitted=verdict.is_overfitted,
            images=len(self.images.examples),
            images_of=self.images.of,
            base_pictures=self.base_pictures,
        )

    def _cells(self) -> Iterator[JudgedCell]:
        for step in self.order.steps:
            for strength in self.order.strengths:
                if strength:
                    pictures = tuple(self._pictures(step, strength))
                    yield JudgedCell(step, strength, Scores.mean(one.scores for one in pictures), pictures)

    def _pictures(self, step: int, strength: float) -> Iterator[JudgedPicture]:
        asked = [(prompt, seed) for prompt in self.order.prompts for seed in self.order.seeds]
        drawn = _drawn(self.vae, [self.order.file(Cell(step, strength, *each)) for each in asked])
        scores = (self.style.gained(drawn, self.base), self.content.kept(drawn, self.base), self.content.copying(drawn))
        nearest = [self.images.examples[row].name for row in self.content.nearest(drawn)]
        for (prompt, seed), name, *values in zip(asked, nearest, *map(Tensor.tolist, scores), strict=True):
            yield JudgedPicture(prompt, seed, Scores(*values), name)


def _drawn(vae: AutoencoderKL, files: Sequence[Path]) -> Features:
    parts = (files[start : start + _AT_ONCE] for start in range(0, len(files), _AT_ONCE))
    return _together([features_of(vae, drawn_pictures(part)) for part in parts])


def _true(vae: AutoencoderKL, images: TrainingImages, size: int) -> Features:
    rows = range(len(images.examples))
    parts = (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
    return _together([features_of_true(vae, images.pictures(part, size)) for part in parts])


def _together(parts: Sequence[Features]) -> Features:
    grams = tuple(torch.cat(stage) for stage in zip(*(part.grams for part in parts), strict=True))
    return Features(grams, torch.cat([part.layout for part in parts]))


def _size(file: Path) -> int:
    with Image.open(file) as picture:
        return picture.width

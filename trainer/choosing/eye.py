"""Looks at pictures and training images through a base's encoder, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from ...datasets.workers import Progress
from .features import Features, features_of, features_of_true
from .training import TrainingImages, drawn_pictures

_AT_ONCE = 8


def quietly(done: int, total: int) -> None:
    """For those who do not want to know."""
    del done, total


@dataclass
class Eye:
    """The encoder, and how many it has seen; `progress` is told of each few, of `total`."""

    vae: AutoencoderKL
    total: int = 0
    progress: Progress = quietly
    _seen: int = field(default=0, init=False)

    def drawn(self, files: Sequence[Path]) -> Features:
        """Of pictures that a UNet has drawn."""
        parts = (files[start : start + _AT_ONCE] for start in range(0, len(files), _AT_ONCE))
        return self._look(features_of(self.vae, drawn_pictures(part)) for part in parts)

    def true(self, images: TrainingImages, side: int) -> Features:
        """Of training images, as squares of so many pixels a side."""
        rows = range(len(images.examples))
        parts = (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
        return self._look(features_of_true(self.vae, images.pictures(part, side)) for part in parts)

    def _look(self, parts: Iterable[Features]) -> Features:
        found: list[Features] = []
        for part in parts:
            found.append(part)
            self._seen += len(part)
            self.progress(self._seen, self.total)
        return Features.joined(found)


def side_of(picture: Path) -> int:
    """Pixels of a square picture's side."""
    with Image.open(picture) as opened:
        return opened.width

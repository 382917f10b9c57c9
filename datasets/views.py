"""How an image is shown: which part of it, how large, mirrored or not, in which colours.

An image has one view or several. They are fixed before training, so that each can be encoded once and cached; the
showings of an image take them in turn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from .buckets import BucketRules, Fit, fit, fit_to

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class Colours:
    """Changes of colour: factors of brightness, contrast and saturation, and a turn of the hue, -0.5 to 0.5."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


AS_THEY_ARE = Colours()


@dataclass(frozen=True)
class View:
    """One way in which an image is shown."""

    fit: Fit
    flip: bool = False
    """Mirrored left to right."""
    colours: Colours = AS_THEY_ARE

    @property
    def crop_left(self) -> int:
        """Pixels cut off at the left of what is seen; of a mirrored image those at its right."""
        cut = self.fit.resized[0] - self.fit.bucket[0]
        return cut - self.fit.crop_left if self.flip else self.fit.crop_left

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditions (Podell et al. 2023): original height and width, crop top and left, target height and
        width. The crop counts in pixels of the resized image, as it does there."""
        (width, height), (target_width, target_height) = self.fit.original, self.fit.bucket
        return height, width, self.fit.crop_top, self.crop_left, target_height, target_width


@dataclass(frozen=True)
class Augmentation:
    """What makes further views of an image."""

    flip: bool = False
    crop: Crop = "center"
    crop_jitter: float = 0.0
    """An image is enlarged by up to this share before it is cropped."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this share, the hue by up to a tenth of it."""
    count: int = 1
    """Views that are drawn where something is random."""

    @property
    def is_random(self) -> bool:
        return self.crop == "random" or self.crop_jitter > 0 or self.colour_jitter > 0


def views_of(
    width: int, height: int, resolutions: Sequence[int], rules: BucketRules, augmentation: Augmentation, seed: str
) -> tuple[View, ...]:
    """All views of an image of this size: each resolution, each drawn crop and colour, straight and mirrored.

    The same seed draws the same views. The first is always straight, at the first resolution.
    """
    draw = random.Random(seed)
    fits = [fit(width, height, resolution, rules) for resolution in resolutions]
    drawn = [
        view
        for _ in range(augmentation.count if augmentation.is_random else 1)
        for view in _draw(fits, augmentation, draw)
    ]
    flips = (False, True) if augmentation.flip else (False,)
    return tuple(View(view.fit, flip, view.colours) for view, flip in product(drawn, flips))


def _draw(fits: Sequence[Fit], augmentation: Augmentation, draw: random.Random) -> Iterator[View]:
    for centred in fits:
        shown = centred
        if augmentation.crop == "random" or augmentation.crop_jitter:
            zoom = 1 + draw.uniform(0, augmentation.crop_jitter)
            place = (draw.random(), draw.random()) if augmentation.crop == "random" else (0.5, 0.5)
            shown = fit_to(*centred.original, centred.bucket, zoom, place)
        strength = augmentation.colour_jitter
        factors = [1 + draw.uniform(-strength, strength) for _ in range(3)] if strength else []
        colours = Colours(*factors, hue=draw.uniform(-strength, strength) / 10) if strength else AS_THEY_ARE
        yield View(shown, colours=colours)


def show(picture: Image.Image, view: View, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """An upright picture of the original size as it is seen: its part resized to the bucket, mirrored, recoloured."""
    seen = picture.resize(view.fit.bucket, resample, box=view.fit.box)
    if view.flip:
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return recolour(seen, view.colours) if seen.mode == "RGB" else seen


def recolour(picture: Image.Image, colours: Colours) -> Image.Image:
    """Brightness, contrast and saturation as Pillow defines them, then a turn of the hue."""
    for enhance, factor in (
        (ImageEnhance.Brightness, colours.brightness),
        (ImageEnhance.Contrast, colours.contrast),
        (ImageEnhance.Color, colours.saturation),
    ):
        picture = enhance(picture).enhance(factor) if factor != 1 else picture
    if not colours.hue:
        return picture
    values = np.asarray(picture.convert("HSV")).copy()
    values[..., 0] = (values[..., 0].astype(int) + round(256 * colours.hue)) % 256
    return Image.fromarray(values, "HSV").convert("RGB")

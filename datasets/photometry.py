"""What can be measured on one picture: likeness, blur, JPEG blocks, borders, tone. Pure functions of its pixels.

Each measure has a unit, so that a message can say what was found, and not only that it was too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..trainer.errors import DataError
from .images import UnreadableImageError, read_rgb

Floats = NDArray[np.floating]
Bytes = NDArray[np.uint8]

NORMAL_SIDE = 512
"""Shorter side, in pixels, at which pictures are compared; larger ones are reduced to it, smaller ones stay."""


@dataclass(frozen=True)
class Borders:
    """Widths in pixels of the uniform bars around a picture."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))

    def __str__(self) -> str:
        sides = {"left": self.left, "top": self.top, "right": self.right, "bottom": self.bottom}
        return ", ".join(f"{pixels} px {side}" for side, pixels in sides.items() if pixels)

    def inside(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box within the bars, as Pillow's `crop` takes it."""
        return self.left, self.top, width - self.right, height - self.bottom


@dataclass(frozen=True)
class Tone:
    """What a picture looks like from afar; shares from 0 to 1, balances from -1 to 1."""

    brightness: float
    contrast: float
    """Standard deviation of the brightness."""
    colourfulness: float
    warmth: float
    """Red less blue."""
    green: float
    """Green less the mean of red and blue."""
    detail: float
    """Share of the pixels that lie on an edge."""


@dataclass(frozen=True)
class Measures:
    """All measures of one picture; small, since they are sent over from worker processes."""

    likeness: bytes
    """The 256 bits of a perceptual hash."""
    patches: bytes
    """The picture on `PATCHES` x `PATCHES` pixels, YCbCr."""
    blur: float | None
    """Radius of the blur of its sharpest edges, in pixels at the normal side; None if it has no edges."""
    blocks: float
    """Grey levels by which steps on an 8 x 8 grid exceed those beside it."""
    borders: Borders
    tone: Tone


def measure(path: Path) -> Measures:
    """Decode a picture once, and measure it.

    Raises:
        DataError: if the file cannot be read any more.
    """
    try:
        image, _ = read_rgb(path)
    except (UnreadableImageError, OSError) as error:
        raise DataError(f"could be read before, and now cannot ({error})", str(path), "Start again.") from error
    borders = find_borders(np.asarray(image))
    inner = image.crop(borders.inside(image.width, image.height))  # bars have no part in what it looks like
    small = reduced(inner, NORMAL_SIDE)
    return Measures(
        likeness=likeness(small),
        patches=patches(small),
        blur=blur_radius(grey(small)),
        blocks=block_steps(grey(centre(inner, _BLOCKS_SEEN))),
        borders=borders,
        tone=tone(small),
    )


def reduced(image: Image.Image, side: int) -> Image.Image:
    """The picture with its shorter side at most `side`."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def centre(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, at most `side` wide and high."""
    width, height = min(image.width, side), min(image.height, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def grey(image: Image.Image) -> Floats:
    """Brightness, (height, width), 0 to 255."""
    return np.asarray(image.convert("L"), dtype=np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# likeness

_HASH_SIDE = 16
PATCHES = 32


def likeness(image: Image.Image) -> bytes:
    """The perceptual hash of a picture (signs of its lowest 16 x 16 cosine frequencies), 32 bytes."""
    import imagehash  # which imports scipy

    return np.packbits(imagehash.phash(image, hash_size=_HASH_SIDE).hash).tobytes()


def patches(image: Image.Image) -> bytes:
    """Brightness and colours of a picture from very far away: 32 x 32 pixels, YCbCr."""
    return image.resize((PATCHES, PATCHES), Image.Resampling.BOX).convert("YCbCr").tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# blur

_TILE = 32
_STRONGEST_TILES = 0.1
_FEWEST_TILES = 4
_EDGE = 8.0
"""Grey levels a pixel; what changes more slowly is shading, or too faint to be judged."""
_NEAR_AN_EDGE = 1 / 16
"""Share of the tile's largest squared gradient: a quarter of its slope. Flat parts hold noise, which looks sharp."""
_HALVINGS = 2


def blur_radius(pixels: Floats) -> float | None:
    """Standard deviation, in pixels, of the Gaussian that blurs the sharpest edges of a picture; None without edges.

    It is the variance of the Laplacian, the usual measure, set against the edges it is taken from, so that it is blind
    to contrast, to how many edges there are, and to flat areas: an illustration of flat shapes is sharp. For a step
    blurred by s, the integral over f'^2 is 2 s^2 times the one over f''^2. Only the tiles with the strongest edges
    count, for a background out of focus makes no blurred picture. A sharp step reads about 0.4, a blurred one up to a
    third too much. Where a strong blur has left no slope that counts as an edge, half the size is looked at, and a
    quarter.
    """
    for halvings in range(_HALVINGS + 1):
        radius = _blur_radius_here(pixels)
        if radius is not None:
            return radius * 2**halvings
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return None


def _blur_radius_here(pixels: Floats) -> float | None:
    if min(pixels.shape) < _TILE + 2:
        return None
    across, down = (pixels[1:-1, 2:] - pixels[1:-1, :-2]) / 2, (pixels[2:, 1:-1] - pixels[:-2, 1:-1]) / 2
    slopes = _tiles(across**2 + down**2)
    around = pixels[1:-1, 2:] + pixels[1:-1, :-2] + pixels[2:, 1:-1] + pixels[:-2, 1:-1]
    bends = _tiles((around - 4 * pixels[1:-1, 1:-1]) ** 2)

    steepest = slopes.max(axis=1)
    chosen = np.argsort(-steepest)[: max(_FEWEST_TILES, int(len(steepest) * _STRONGEST_TILES))]
    chosen = chosen[steepest[chosen] >= _EDGE**2]
    if not len(chosen):
        return None
    on_edges = slopes[chosen] >= _NEAR_AN_EDGE * steepest[chosen, None]
    slope, bend = (slopes[chosen] * on_edges).sum(axis=1), (bends[chosen] * on_edges).sum(axis=1)
    return float(np.quantile(np.sqrt(slope / (2 * bend + 1e-6)), 0.25))


def _tiles(values: Floats) -> Floats:
    """(height, width) to (tiles, pixels of a tile); what is left over at the right and the bottom is dropped."""
    rows, columns = values.shape[0] // _TILE, values.shape[1] // _TILE
    whole = values[: rows * _TILE, : columns * _TILE].reshape(rows, _TILE, columns, _TILE)
    return whole.swapaxes(1, 2).reshape(rows * columns, _TILE * _TILE)


# ---------------------------------------------------------------------------------------------------------------------
# blocks

_BLOCK = 8
_BLOCKS_SEEN = 512
"""Pixels; the middle of a large picture tells enough."""
_FEWEST_BLOCKS = 16
"""Along a side; fewer tell little, and the edges of the picture itself may lie on them by chance."""
_LARGEST_STEP = 24
"""Grey levels; JPEG's own steps are smaller."""
_EDGE_STEP, _OWN_GRID, _OWN_EDGES = 48, 100.0, 0.01
"""Where steps of so many levels make up this share on the grid, and are a hundred times as frequent there as elsewhere,
the picture is made of cells of 8 pixels itself, as pixel art is. At the lowest quality JPEG reaches 40 times."""


def block_steps(pixels: Floats) -> float:
    """How strongly the 8 x 8 grid of JPEG shows, in grey levels, whatever the file's format is now.

    The grid may begin anywhere, for the picture may have been cropped since: of its 8 places the strongest is set
    against the second, down and across, and the weaker of the two counts. A picture that was resized since has lost
    the grid.
    """
    if min(pixels.shape) < _FEWEST_BLOCKS * _BLOCK:
        return 0.0
    return max(0.0, min(_grid_excess(pixels), _grid_excess(pixels.T)))


def _grid_excess(pixels: Floats) -> float:
    steps = np.abs(np.diff(pixels, axis=1))
    middle = steps[:, 1:-1]
    edges = np.sort([(middle[:, place::_BLOCK] > _EDGE_STEP).mean() for place in range(_BLOCK)])
    if edges[-1] > max(_OWN_EDGES, _OWN_GRID * edges[-2]):
        return 0.0
    excess = (middle - (steps[:, :-2] + steps[:, 2:]) / 2) * (middle <= _LARGEST_STEP)
    counted = np.maximum(1, [(middle[:, place::_BLOCK] <= _LARGEST_STEP).sum() for place in range(_BLOCK)])
    by_place = np.sort([excess[:, place::_BLOCK].sum(dtype=np.float64) for place in range(_BLOCK)] / counted)
    return float(by_place[-1] - by_place[-2])


# ---------------------------------------------------------------------------------------------------------------------
# borders

_SAME_COLOUR = 12
"""Levels of a channel, which leaves room for JPEG's noise in a bar."""
_STRAY = 0.02
"""Share of a bar's line that may differ from its colour."""
_THINNEST = 0.01
"""Of the side; thinner bars hardly show, and the crop to a bucket often takes them off."""
_LINES_BEGINNING = 4
"""A picture's edge may be soft; within so many lines it has begun."""
_FILLED, _CORNER_FILLED, _CORNER = 0.85, 0.8, 1 / 24


def find_borders(pixels: Bytes) -> Borders:
    """The bars of one colour around a picture (height, width, 3).

    The rule, which is to leave objects on a plain ground alone: bars come in opposite pairs of one colour (left and
    right, top and bottom, or all four; a single plain side is a sky or a wall), and what they enclose is a rectangle
    that begins along its whole length at once, to its corners. An object touches its ground in a few places only, and
    an icon with round corners misses them. A rectangular object seen straight, on a plain ground, is a framed picture
    to this rule. In doubt there are no bars.
    """
    height, width = pixels.shape[:2]
    top, bottom = _pair(pixels)
    left, right = _pair(pixels.swapaxes(0, 1))
    borders = Borders(left, top, right, bottom)
    if not borders or top + bottom >= height or left + right >= width:
        return Borders()
    inner = pixels[top : height - bottom, left : width - right]
    sides = []
    if top:
        sides += [(inner, pixels[0]), (inner[::-1], pixels[-1])]
    if left:
        sides += [(inner.swapaxes(0, 1), pixels[:, 0]), (inner.swapaxes(0, 1)[::-1], pixels[:, -1])]
    return borders if all(_begins_at_once(lines, _colour(bar)) for lines, bar in sides) else Borders()


def _pair(lines: Bytes) -> tuple[int, int]:
    """Widths of the plain bars at the first and the last line; zeros if they are no pair."""
    first, last = _colour(lines[0]), _colour(lines[-1])
    if np.abs(first - last).max() > _SAME_COLOUR:
        return 0, 0
    widths = _plain_lines(lines, first), _plain_lines(lines[::-1], last)
    return widths if min(widths) >= max(2, _THINNEST * len(lines)) else (0, 0)


def _colour(line: Bytes) -> NDArray[np.int16]:
    return np.median(line, axis=0).astype(np.int16)


def _plain_lines(lines: Bytes, colour: NDArray[np.int16]) -> int:
    """How many lines, from the first on, are of this colour."""
    for number, line in enumerate(lines):
        off = np.abs(line - colour).max(axis=1)
        if off.mean() > _SAME_COLOUR / 3 or (off > _SAME_COLOUR).mean() > _STRAY:
            return number
    return len(lines)


def _begins_at_once(lines: Bytes, ground: NDArray[np.int16]) -> bool:
    """Whether the first lines differ from the ground along their length, and at both ends."""
    differs = (np.abs(lines[:_LINES_BEGINNING] - ground).max(axis=2) > _SAME_COLOUR).any(axis=0)
    corner = max(_LINES_BEGINNING, int(len(differs) * _CORNER))
    corners = min(differs[:corner].mean(), differs[-corner:].mean())
    return bool(differs.mean() >= _FILLED and corners >= _CORNER_FILLED)


# ---------------------------------------------------------------------------------------------------------------------
# tone

_FAR_SIDE = 128


def tone(image: Image.Image) -> Tone:
    """Brightness, colours and amount of detail of a picture seen from afar."""
    small = reduced(image, _FAR_SIDE)
    red, green, blue = (np.asarray(small, dtype=np.float32) / 255).transpose(2, 0, 1)
    light = grey(small)
    slopes = np.hypot(light[:-1, 1:] - light[:-1, :-1], light[1:, :-1] - light[:-1, :-1])
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return Tone(
        brightness=float(light.mean()) / 255,
        contrast=float(light.std()) / 255,
        colourfulness=float(chroma.mean()),
        warmth=float((red - blue).mean()),
        green=float((green - (red + blue) / 2).mean()),
        detail=float((slopes > _EDGE).mean()) if slopes.size else 0.0,
    )

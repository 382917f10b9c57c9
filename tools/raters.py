"""`python -m tools.raters`: what the raters of `tools/preferences.py` look at, and what room the style leaves them.

Of the true pictures of the example style and of the base: how large each number is, how much it varies within the
style, how far the base is from there, and how it goes together with how dark a picture is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from lorasmith.trainer.example import EXAMPLES


def warmth(picture: Image.Image) -> float:
    """Mean of red minus blue, -1 to 1."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return float((pixels[..., 0] - pixels[..., 2]).mean())


def lightness(picture: Image.Image) -> float:
    """Mean of red, green and blue, 0 to 1."""
    return float(np.asarray(picture.convert("RGB"), dtype=np.float64).mean() / 255)


def darkness(picture: Image.Image) -> float:
    """1 minus the lightness."""
    return 1 - lightness(picture)


def ink(picture: Image.Image) -> float:
    """Share of the sheet that is darker than the middle grey, 0 to 1."""
    return float((np.asarray(picture.convert("L")) < 128).mean())


def contrast(picture: Image.Image) -> float:
    """Standard deviation of the grey tones over the picture, 0 to 0.5."""
    return float(np.asarray(picture.convert("L"), dtype=np.float64).std() / 255)


RATERS: dict[str, Callable[[Image.Image], float]] = {
    "darkness": darkness,
    "ink": ink,
    "contrast": contrast,
    "lightness": lightness,
    "warmth": warmth,
}


HEAD = """\
| number | style | spread in it | base | base is away by | with darkness, style | with darkness, base |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    """A table of what the true pictures tell."""
    style, base = (_measured(EXAMPLES / "measure" / side) for side in ("target", "base"))
    dark = [*RATERS].index("darkness")
    typer.echo(HEAD)
    for place, name in enumerate(RATERS):
        mean, spread, other = style[:, place].mean(), style[:, place].std(ddof=1), base[:, place].mean()
        goes = [float(np.corrcoef(side[:, place], side[:, dark])[0, 1]) for side in (style, base)]
        told = [f"{mean:.3f}", f"{spread:.3f}", f"{other:.3f}", f"{(other - mean) / spread:+.1f}"]
        typer.echo(f"| {' | '.join([name, *told, *(f'{one:+.2f}' for one in goes)])} |")


def _measured(folder: Path) -> np.ndarray:
    """Of each picture each number, (pictures, raters)."""
    pictures = [Image.open(file) for file in sorted(folder.glob("*.webp"))]
    return np.array([[rate(picture) for rate in RATERS.values()] for picture in pictures])


if __name__ == "__main__":
    typer.run(main)

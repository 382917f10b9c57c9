"""Images to train on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

_COLOURS = ("teal", "crimson", "gold", "navy")


def some_images(folder: Path) -> Path:
    """Four captioned pictures."""
    folder.mkdir(parents=True)
    for colour in _COLOURS:
        Image.new("RGB", (96, 96), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a square in {colour}\n", encoding="utf-8")
    return folder

"""Image files to upright RGB pictures, with a note of everything that was done to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
UNREAD_IMAGES = {
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".tga", ".exr", ".hdr", ".ico", ".svg"),
    *(".psd", ".psb", ".xcf", ".kra"),  # of painting programs
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),  # of cameras
}
"""Suffixes of pictures that are not read, so that a folder which holds some is not taken for complete."""
EXIF_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """The file has an image's name, but its pixels cannot be decoded."""


def read_rgb(path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture upright in RGB, and notes such as "rotated by EXIF".

    EXIF orientation is applied, transparency is laid on white, other colour modes are converted.

    Raises:
        UnreadableImageError: if the file is no image, or is damaged.
    """
    notes = []
    try:
        with Image.open(path) as file:
            orientation = file.getexif().get(EXIF_ORIENTATION, 1)
            if getattr(file, "n_frames", 1) > 1:
                notes.append("first frame of an animation")
            file.load()
            image = ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(str(error)) from error
    if orientation not in (0, 1):
        notes.append(f"rotated by EXIF orientation {orientation}")
    mode, image = image.mode, _to_8_bit(image)
    if image.has_transparency_data:
        if min(image.convert("RGBA").getchannel("A").tobytes()) < 255:
            notes.append("transparency laid on white")
        image = on_white(image)
    elif mode != "RGB":
        notes.append(f"converted from {mode} to RGB")
        image = image.convert("RGB")
    return image, tuple(notes)


def on_white(image: Image.Image) -> Image.Image:
    """Composite a picture with transparency on a white ground."""
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, "white")
    ground.alpha_composite(rgba)
    return ground.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey, with alpha if a value is transparent; Pillow would clip instead of scale."""
    if not (image.mode.startswith("I;16") or image.mode == "I"):
        return image
    values = np.asarray(image.convert("I"))
    grey = Image.fromarray((values // 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return grey

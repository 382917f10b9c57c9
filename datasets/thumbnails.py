"""Small pictures of training images, made once and kept in the user's cache.

A thumbnail's name is a hash of the image's place, size and time of writing, so that an image which was changed gets
another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps

from ..trainer.files import atomic_file, user_cache
from .images import DECODING_ERRORS, EXIF_ORIENTATION, UnreadableImageError, formats_here, read_rgb

SIDE = 256
"""Pixels of the longer side."""
THUMBNAIL_NAME = re.compile(r"[0-9a-f]{32}\.webp")
_QUALITY = 80
_THREADS = 4
_ON_ITS_SIDE = range(5, 9)
"""EXIF orientations by which width and height change places."""


def thumbnails() -> Path:
    """The folder that holds them."""
    return user_cache() / "thumbnails"


def thumbnails_of(images: Sequence[Path]) -> list[Path | None]:
    """A thumbnail for each image, made where there is none yet; None for an image that cannot be read."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(thumbnail_of, images))


def thumbnail_of(image: Path) -> Path | None:
    """The thumbnail of one image, upright on white; None if it cannot be read."""
    try:
        found = image.stat()
        known = f"{image.absolute()}\n{found.st_size}\n{found.st_mtime_ns}"
        file = thumbnails() / f"{hashlib.sha256(known.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.webp"
        if not file.is_file():
            picture = _reduced_jpeg(image) or read_rgb(image)[0]
            picture.thumbnail((SIDE, SIDE))
            with atomic_file(file) as temporary:
                picture.save(temporary, "WEBP", quality=_QUALITY, icc_profile=picture.info.get("icc_profile"))
    except (OSError, UnreadableImageError):
        return None
    return file


def size_of(image: Path) -> tuple[int, int] | None:
    """Upright width and height in pixels, from the file's head alone; None if it has none that can be read."""
    try:
        with Image.open(image, formats=formats_here()) as file:
            width, height = file.size
            return (height, width) if file.getexif().get(EXIF_ORIENTATION) in _ON_ITS_SIDE else (width, height)
    except DECODING_ERRORS:
        return None


def _reduced_jpeg(image: Path) -> Image.Image | None:
    """A JPEG as its decoder reduces it, many times faster than in full; its colour profile goes along, for the browser
    to apply. None for other files."""
    if image.suffix.lower() not in (".jpg", ".jpeg", ".jpe", ".jfif"):
        return None
    try:
        with Image.open(image, formats=("JPEG",)) as file:
            file.draft("RGB", (2 * SIDE, 2 * SIDE))
            file.load()
            return ImageOps.exif_transpose(file) if file.mode == "RGB" else None
    except DECODING_ERRORS:
        return None

"""Image files to upright sRGB pictures, with a note of everything that was done to them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What Pillow may take a file for, whatever its name says; its other decoders, some of which start programs,
stay shut."""
UNREAD_IMAGES = {
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".tga", ".exr", ".hdr", ".ico", ".svg"),
    *(".psd", ".psb", ".xcf", ".kra"),  # of painting programs
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),  # of cameras
}
"""Suffixes of pictures that are not read, so that a folder which holds some is not taken for complete."""
EXIF_ORIENTATION = 0x0112
warnings.filterwarnings("ignore", module=r"PIL\.")
"""Of broken EXIF data, which nobody here reads, and of large images: those over twice that size are errors. Once for
all, because images are decoded in threads, in which filters cannot be changed for a while only."""
LAID_ON_WHITE = "transparency laid on white"
NOTHING_SHOWN = "transparent everywhere"


class UnreadableImageError(ValueError):
    """The file has an image's name, but its pixels cannot be decoded."""


def read_rgb(path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture upright in sRGB, and notes such as "rotated by EXIF orientation 6".

    EXIF orientation and colour profile are applied, transparency is laid on white, other colour modes are converted.

    Raises:
        UnreadableImageError: if the file is no image, or is damaged, or too large to be decoded safely.
    """
    image, notes = _read_upright(path)
    mode, profile = image.mode, image.info.get("icc_profile")
    image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if profile:
        image, note = _to_srgb(image, profile)
        notes += [note] if note else []
    if image.has_transparency_data:
        least, most = image.convert("RGBA").getchannel("A").getextrema()
        if least < 255:  # pyright: ignore[reportOperatorIssue]
            notes.append(LAID_ON_WHITE)
        if most == 0:
            notes.append(NOTHING_SHOWN)
        image = on_white(image)
    elif mode != "RGB":
        notes.append(f"converted from {mode} to RGB")
        image = image.convert("RGB")
    return image, tuple(notes)


def read_alpha(path: Path) -> Image.Image | None:
    """The picture's opacity, upright, mode L: 255 where it is opaque; None if nothing in it is transparent."""
    image = _to_8_bit(_read_upright(path)[0])
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def read_grey(path: Path) -> Image.Image:
    """A mask: upright, mode L; what is transparent in it is black."""
    image = _to_8_bit(_read_upright(path)[0])
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "black")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("L")


def _read_upright(path: Path) -> tuple[Image.Image, list[str]]:
    notes: list[str] = []
    try:
        with Image.open(path, formats=formats_here()) as file:
            orientation = file.getexif().get(EXIF_ORIENTATION, 1)
            if getattr(file, "is_animated", False):  # to count its frames, all of them would be read
                notes.append("first frame of an animation")
            file.load()
            image = ImageOps.exif_transpose(file)
    except DECODING_ERRORS as error:
        raise UnreadableImageError(_in_words(error)) from error
    if image.mode == "F":
        raise UnreadableImageError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if orientation in range(2, 9):
        notes.append(f"rotated by EXIF orientation {orientation}")
    return image, notes


@lru_cache
def formats_here() -> tuple[str, ...]:
    """Older versions of Pillow, and some builds of it, do without AVIF or WebP."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


DECODING_ERRORS = (
    *(UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError),
    # by damaged headers, from decoders
    *(LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError, RuntimeError),
    *(struct.error, zlib.error),
)
"""What Pillow raises of a damaged file."""


def _in_words(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return "it is none of the kinds that are known, whatever its name says"
    return str(error) or type(error).__name__


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """The colours of a picture with an ICC profile as sRGB, mode RGB or RGBA, and a note if anything changed."""
    if image.mode == "P":
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if "srgb" in name.lower():
            return image, ""
        colours = image.convert("RGB") if image.mode == "RGBA" else image
        with_colours = ImageCms.profileToProfile(colours, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return image, f"its colour profile cannot be used and was ignored ({str(error) or type(error).__name__})"
    assert with_colours is not None
    if image.mode == "RGBA":
        with_colours.putalpha(image.getchannel("A"))
    return with_colours, f"converted from its colour profile {name!r} to sRGB"


_SRGB = ImageCms.createProfile("sRGB")


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

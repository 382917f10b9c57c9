"""Image files of every kind that is read become upright 8-bit sRGB pictures, and what was done to them is noted."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from lorasmith.datasets.images import UnreadableImageError, read_alpha, read_grey, read_rgb


def close(one: object, other: tuple[int, int, int], tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))  # pyright: ignore


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif", "avif"])
def test_every_kind_of_file_is_read_whatever_its_name(tmp_path: Path, kind: str):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this build of Pillow reads no AVIF")
    Image.new("RGB", (32, 24), (200, 100, 50)).save(tmp_path / "a.jpg", kind)
    image, _ = read_rgb(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert close(image.getpixel((5, 5)), (200, 100, 50), 8)


def profile_with_red_and_blue_exchanged() -> bytes:
    """sRGB's profile under another name, in which the first number is blue light and the third one red."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    tags = struct.unpack_from(">I", data, 128)[0]
    table = bytearray(data)
    for start in range(132, 132 + 12 * tags, 12):
        name = bytes(table[start : start + 4])
        table[start : start + 4] = exchanged.get(name, name)
    return bytes(table).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_converted_from_their_profile_and_that_is_noted(tmp_path: Path, mode: str):
    colour = (250, 20, 10) if mode == "RGB" else (250, 20, 10, 255)
    Image.new(mode, (16, 16), colour).save(tmp_path / "a.png", icc_profile=profile_with_red_and_blue_exchanged())
    image, notes = read_rgb(tmp_path / "a.png")
    assert close(image.getpixel((0, 0)), (10, 20, 250), 12)
    assert [note for note in notes if "colour profile 'test" in note]


def test_an_srgb_profile_changes_nothing(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (16, 16), (250, 20, 10)).save(tmp_path / "a.png", icc_profile=profile)
    image, notes = read_rgb(tmp_path / "a.png")
    assert (image.getpixel((0, 0)), notes) == ((250, 20, 10), ())


def test_a_damaged_profile_is_noted_and_the_picture_is_used(tmp_path: Path):
    Image.new("RGB", (16, 16), (250, 20, 10)).save(tmp_path / "a.png", icc_profile=b"no profile at all")
    image, notes = read_rgb(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == (250, 20, 10)
    assert "was ignored" in notes[0]


def test_16_bit_colour_is_scaled(tmp_path: Path):
    """A PNG of two 16-bit pixels, made by hand: Pillow writes none."""
    row = b"\0" + struct.pack(">6H", 200 * 257, 100 * 257, 50 * 257, 0, 65535, 128 * 257)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    image, _ = read_rgb(tmp_path / "a.png")
    assert close(image.getpixel((0, 0)), (200, 100, 50), 1)
    assert close(image.getpixel((1, 0)), (0, 255, 128), 1)


def test_floating_point_pixels_are_refused_with_the_reason(tmp_path: Path):
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UnreadableImageError, match="floating-point"):
        read_rgb(tmp_path / "a.tiff")


def test_opacity_is_read_upright_and_only_where_there_is_some(tmp_path: Path):
    image = Image.new("RGBA", (20, 10), (1, 2, 3, 255))
    image.paste((0, 0, 0, 0), (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    image.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (20, 10), (1, 2, 3, 255)).save(tmp_path / "b.png")
    alpha = read_alpha(tmp_path / "a.png")
    assert alpha is not None
    assert alpha.size == (10, 20)
    assert (alpha.getpixel((5, 2)), alpha.getpixel((5, 15))) == (0, 255)
    assert read_alpha(tmp_path / "b.png") is None


def test_what_is_transparent_in_a_mask_is_black(tmp_path: Path):
    mask = Image.new("RGBA", (10, 10), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 5, 10))
    mask.save(tmp_path / "m.png")
    read = read_grey(tmp_path / "m.png")
    assert (read.getpixel((2, 2)), read.getpixel((8, 2))) == (255, 0)


def test_other_decoders_of_the_image_library_stay_shut(tmp_path: Path):
    """An EPS file would start Ghostscript."""
    eps = io.BytesIO()
    Image.new("RGB", (16, 16)).save(eps, "EPS")
    (tmp_path / "a.png").write_bytes(eps.getvalue())
    with pytest.raises(UnreadableImageError, match="none of the kinds"):
        read_rgb(tmp_path / "a.png")

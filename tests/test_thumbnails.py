"""Small pictures of training images: made once, upright, small, and never of what is no image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.datasets import thumbnails
from lorasmith.datasets.images import EXIF_ORIENTATION
from lorasmith.datasets.thumbnails import SIDE, THUMBNAIL_NAME, size_of, thumbnail_of, thumbnails_of

from .conftest import draw_picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return thumbnails.thumbnails()


def made(image: Path) -> Image.Image:
    file = thumbnail_of(image)
    assert file
    with Image.open(file) as opened:
        opened.load()
        return opened


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_each_kind_of_image_gets_a_small_webp(tmp_path: Path, cache: Path, suffix: str):
    draw_picture(1, (1200, 600)).save(tmp_path / f"a.{suffix}")
    picture = made(tmp_path / f"a.{suffix}")
    assert (picture.format, picture.size) == ("WEBP", (SIDE, SIDE // 2))
    [file] = cache.iterdir()
    assert THUMBNAIL_NAME.fullmatch(file.name)
    assert size_of(tmp_path / f"a.{suffix}") == (1200, 600)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_it_is_seen_upright(tmp_path: Path, suffix: str):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    left_half_red = Image.new("RGB", (600, 300), "white")
    left_half_red.paste("red", (0, 0, 300, 300))
    left_half_red.save(tmp_path / f"a.{suffix}", exif=exif)
    picture = made(tmp_path / f"a.{suffix}").convert("RGB")
    assert picture.size == (SIDE // 2, SIDE)
    top, bottom = picture.getpixel((60, 40)), picture.getpixel((60, 220))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert (top[1] < 60, bottom[1] > 200) == (True, True)
    assert size_of(tmp_path / f"a.{suffix}") == (300, 600)


def test_transparency_is_white(tmp_path: Path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert made(tmp_path / "a.png").convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_it_is_made_once_until_the_image_changes(tmp_path: Path, cache: Path):
    image = tmp_path / "a.png"
    draw_picture(1, (64, 64)).save(image)
    first = thumbnail_of(image)
    assert first
    written = first.stat().st_mtime_ns
    assert thumbnail_of(image) == first
    assert first.stat().st_mtime_ns == written
    draw_picture(2, (64, 64)).save(image)
    os.utime(image, ns=(1, 1))
    assert thumbnail_of(image) != first


def test_what_is_no_image_has_none(tmp_path: Path, cache: Path):
    draw_picture(1, (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"\xff\xd8\xff and no more")
    names = ["a.png", "b.png", "c.jpg", "not there.png"]
    assert [bool(file) for file in thumbnails_of([tmp_path / name for name in names])] == [True, False, False, False]
    assert [bool(size_of(tmp_path / name)) for name in names] == [True, False, False, False]
    assert len(list(cache.iterdir())) == 1


def test_a_file_that_only_has_the_suffix_is_read_by_what_it_is(tmp_path: Path):
    draw_picture(1, (64, 32)).save(tmp_path / "a.jpg", "PNG")
    assert made(tmp_path / "a.jpg").size == (64, 32)
    draw_picture(1, (64, 32)).convert("CMYK").save(tmp_path / "b.jpg", "JPEG")
    assert made(tmp_path / "b.jpg").mode == "RGB"

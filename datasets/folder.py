"""A folder of images to a list of items: captions, repeats, mask, size, what was done to each. Nothing is skipped
silently.

`sidecars.py` finds the captions; for kohya's `10_name` folders the folder's name is the caption of images without one.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import DataError, Problem
from ..trainer.files import sha256_of
from .captions import tidy
from .images import IMAGE_SUFFIXES, LAID_ON_WHITE, NOTHING_SHOWN, UNREAD_IMAGES, UnreadableImageError, read_rgb
from .masks import (
    Mask,
    MaskFrom,
    check_mask,
    is_mask,
    masks_by_image,
    masks_taken_for_pictures,
    read_mask_facts,
    sound_masks,
)
from .sidecars import Caption, Lines, Sidecars, cannot_be_read
from .workers import Progress, map_files

MOST_REPEATS = 500
MOST_FILES = 200_000
"""Twice as many as an archive may have; more are no dataset, but a disk or a home."""
_LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir", "@tmp", "@Recycle", "#recycle"}
_REPEATS = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Item:
    """One image with its captions."""

    path: Path
    sha256: str
    """Of the file's bytes: an edited image is another image."""
    width: int
    height: int
    """Upright size in pixels, after EXIF orientation."""
    captions: tuple[str, ...]
    """As found, before any rule; at least one, which may be empty. Several are variants of one another."""
    source: str
    """Where the caption comes from, e.g. `cat.txt`, `metadata.jsonl line 3`, `folder name`, or `none`."""
    machine: bool = False
    """Whether a machine wrote the caption, and nobody has changed it since."""
    transparent: bool = False
    mask: Mask | None = None
    repeats: int = 1
    notes: tuple[str, ...] = ()
    """What was done to the image, e.g. `rotated by EXIF orientation 6`."""

    @property
    def caption(self) -> str:
        """The first variant."""
        return self.captions[0]


@dataclass(frozen=True)
class Found:
    """What lies in a folder: the images that can be used, and everything that cannot."""

    items: list[Item]
    problems: list[Problem]


def scan(folder: Path, lines: Lines = "join", mask: MaskFrom = "files", progress: Progress | None = None) -> list[Item]:
    """All images under a folder, sorted by path.

    Raises:
        DataError: every unusable file at once: no folder, no images, unreadable images, captions that would be ignored.
    """
    found = look(folder, lines, mask, progress)
    if found.problems:
        raise DataError.of(found.problems)
    return found.items


def look(
    folder: Path,
    lines: Lines = "join",
    mask: MaskFrom = "files",
    progress: Progress | None = None,
    unmasked_weight: float = 0.0,
) -> Found:
    """All images under a folder that can be used, sorted by path, and all problems.

    Args:
        unmasked_weight: of the loss where a mask is black; above 0 a mask may be black everywhere.

    Raises:
        DataError: if there is no such folder.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of images" if folder.is_file() else "there is no such folder"
        raise DataError(what, str(folder), "Set data.path to the folder that holds your images.")
    problems: list[Problem] = []
    files = sorted(walk(folder, problems))
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    masks = [file for file in pictures if mask == "files" and is_mask(folder, file)]
    images = sorted(set(pictures) - set(masks))
    if not images:
        return Found([], [no_images(folder, files), *problems])
    problems += ignored(folder, files, images)
    if mask != "files":
        problems += masks_taken_for_pictures(folder, images)
    by_image = masks_by_image(folder, images, masks, problems)
    facts = dict(zip(masks, map_files(read_mask_facts, masks), strict=True))
    captions = Sidecars(images, lines, problems).read(files)
    known = Known(folder, captions, sound_masks(by_image, facts, problems))
    items: list[Item] = []
    for pixels in map_files(read_pixels_of, images, progress):
        if isinstance(pixels, Problem):
            problems.append(pixels)
            continue
        item = known.item(pixels)
        if item.mask and (wrong := check_mask(item.mask, item.width, item.height, unmasked_weight)):
            problems.append(wrong)
        if mask == "alpha" and NOTHING_SHOWN in item.notes:
            problems.append(Problem(str(item.path), f"is {NOTHING_SHOWN}, so it would teach nothing", "Remove it."))
        items.append(item)
    if problems and not folder.is_dir():
        what = "is there no more: it was removed, or its disk was unplugged, while it was read"
        raise DataError(what, str(folder), "Put it back, or connect its disk again, and try again.")
    return Found(items, problems)


def walk(folder: Path, problems: list[Problem]) -> list[Path]:
    """All files, without hidden ones and the folders that systems and tools leave behind; each folder once.

    A link that leads out of the folder is a problem: what lies there may change, or may not be meant to be read.

    Raises:
        DataError: if there are more than a dataset has, as on a whole disk.
    """

    def cannot_open(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"cannot be opened ({error.strerror})", "Change its permissions."))

    def stays_inside(path: Path) -> bool:
        if not path.is_symlink() or path.resolve().is_relative_to(root):
            return True
        what = f"is a link that leads out of the folder, to {path.resolve()}"
        problems.append(
            Problem(str(path), what, "Put a copy in its place, or name that folder in a [[data]] of its own.")
        )
        return False

    root = folder.resolve()
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=cannot_open, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:  # a link has led back
            folders.clear()
            continue
        visited.add(place)
        inner = [name for name in folders if not name.startswith(".") and name not in _LEFT_BY_SYSTEMS]
        folders[:] = sorted(name for name in inner if stays_inside(Path(parent, name)))
        plain = [Path(parent, name) for name in names if not name.startswith(".") and name != "Thumbs.db"]
        found += [file for file in plain if stays_inside(file)]
        if len(found) > MOST_FILES:
            raise DataError(f"holds more than {MOST_FILES:,} files", str(folder), "Name the folder of your images.")
    return found


def no_images(folder: Path, files: list[Path]) -> Problem:
    found = Counter(file.suffix.lower() or "no suffix" for file in files)
    seen = ", ".join(f"{count} x {suffix}" for suffix, count in found.most_common(5)) or "it is empty"
    return Problem(str(folder), f"holds no images ({seen})", f"Known are {', '.join(sorted(IMAGE_SUFFIXES))}.")


def ignored(folder: Path, files: list[Path], images: list[Path]) -> Iterator[Problem]:
    """Files and folders that a person may take for a part of the data, and that are none."""
    read = {image.with_suffix("") for image in images}
    for file in files:
        if file.suffix.lower() in UNREAD_IMAGES and file.with_suffix("") not in read:  # else the source of an export
            yield Problem(
                str(file), "is a kind of image that is not read", "Save it as PNG or JPEG, or move it elsewhere."
            )
    kohya_folders = {kohya for image in images if (kohya := kohya_folder(folder, image))}
    for kohya in sorted(kohya for kohya in kohya_folders if _repeats_of(kohya) == 0):
        yield Problem(
            str(kohya),
            "asks for 0 repeats, so its images would never be shown",
            "Rename it to begin with another number, or move it elsewhere.",
        )


@dataclass(frozen=True)
class Pixels:
    """What decoding an image tells of it."""

    path: Path
    sha256: str
    width: int
    height: int
    transparent: bool
    notes: tuple[str, ...]


def read_pixels_of(image: Path) -> Pixels | Problem:
    """Decode an image to the last pixel, so that nothing fails later; importable, for worker processes."""
    try:
        sha256, (picture, notes) = sha256_of(image), read_rgb(image)
    except UnreadableImageError as error:
        return Problem(str(image), f"cannot be read as an image ({error})", "Save it again or remove it.")
    except OSError as error:
        return cannot_be_read(image, error)
    return Pixels(image, sha256, picture.width, picture.height, LAID_ON_WHITE in notes, notes)


@dataclass(frozen=True)
class Known:
    """What is known of a folder's images apart from their pixels."""

    folder: Path
    captions: dict[Path, Caption]
    masks: dict[Path, Mask]

    def item(self, pixels: Pixels) -> Item:
        kohya = kohya_folder(self.folder, pixels.path)
        caption = caption_of(self.folder, pixels.path, self.captions)
        return Item(
            path=pixels.path,
            sha256=pixels.sha256,
            width=pixels.width,
            height=pixels.height,
            captions=caption.texts,
            source=caption.source,
            machine=caption.machine,
            transparent=pixels.transparent,
            mask=self.masks.get(pixels.path),
            repeats=_repeats_of(kohya) if kohya else 1,
            notes=pixels.notes,
        )


def caption_of(folder: Path, image: Path, captions: Mapping[Path, Caption]) -> Caption:
    """What was found for an image, or else the name of its kohya folder."""
    if found := captions.get(image):
        return found
    kohya = kohya_folder(folder, image)
    words = tidy(kohya.name.partition("_")[2].replace("_", " ")) if kohya else ""
    return Caption((words,), "folder name" if words else "none")


def kohya_folder(folder: Path, image: Path) -> Path | None:
    """The nearest `10_name` folder above an image.

    A number over 500 is no repeats but a date or a year, as in `2024_summer`, which nobody meant to show 2024 times.
    """
    for parent in image.parents:
        if _REPEATS.fullmatch(parent.name) and _repeats_of(parent) <= MOST_REPEATS:
            return parent
        if parent == folder:
            break
    return None


def _repeats_of(folder: Path) -> int:
    return int(folder.name.partition("_")[0])

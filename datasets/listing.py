"""The images of a folder with their words, without decoding a pixel: quick enough to be read anew whenever asked.

What `folder.py` makes of the same folder has the sizes and hashes besides. The disk is the truth: nothing is kept here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..trainer.errors import Problem, UserError
from .folder import (
    Found,
    Known,
    Pixels,
    caption_of,
    ignored,
    no_images,
    read_pixels_of,
    walk,
)
from .images import IMAGE_SUFFIXES
from .masks import (
    Mask,
    check_mask,
    is_mask,
    masks_by_image,
    read_mask_facts,
    sound_masks,
)
from .sidecars import Lines, Sidecars
from .workers import Progress, map_files

T = TypeVar("T")
Mapper = Callable[..., Iterator[Any]]
"""`workers.map_files`, or one that remembers what it was told of files that have not changed since."""


@dataclass(frozen=True)
class Listed:
    """One image and its words."""

    path: Path
    name: str
    """The path below the folder, with forward slashes."""
    captions: tuple[str, ...]
    """At least one, which may be empty."""
    source: str
    """As in `folder.Item`."""
    machine: bool = False

    @property
    def is_captioned(self) -> bool:
        return any(self.captions)


@dataclass(frozen=True)
class Listing:
    """A folder before its pixels are looked at."""

    folder: Path
    files: list[Path]
    """All that is not hidden, sorted."""
    images: list[Listed]
    masks: dict[Path, Path]
    """The mask of each image that has one."""
    problems: list[Problem]
    sidecars: Sidecars

    def image(self, name: str) -> Listed | None:
        """By its name; None if it is there no longer."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Listed]:
        return {image.name: image for image in self.images}


def list_images(folder: Path, lines: Lines = "join") -> Listing:
    """The images under a folder, sorted by path, with captions and masks.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of images" if folder.is_file() else "there is no such folder"
        raise UserError(what, str(folder), "Name the folder that holds your images.")
    problems: list[Problem] = []
    files = sorted(walk(folder, problems))
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    masks = [file for file in pictures if is_mask(folder, file)]
    images = sorted(set(pictures) - set(masks))
    sidecars = Sidecars(images, lines, problems)
    if not images:
        return Listing(folder, files, [], {}, [no_images(folder, files), *problems], sidecars)
    problems += ignored(folder, files, images)
    captions = sidecars.read(files)

    def listed(path: Path) -> Listed:
        caption = caption_of(folder, path, captions)
        return Listed(path, path.relative_to(folder).as_posix(), caption.texts, caption.source, caption.machine)

    by_image = masks_by_image(folder, images, masks, problems)
    return Listing(folder, files, [listed(path) for path in images], by_image, problems, sidecars)


def look_at(listing: Listing, progress: Progress | None = None, mapper: Mapper = map_files) -> Found:
    """The items of a listing, as `folder.look` finds them: every image decoded, unless the mapper remembers it."""
    folder, problems = listing.folder, list(listing.problems)
    masks = sorted(set(listing.masks.values()))
    facts: dict[Path, Mask | Problem] = dict(zip(masks, mapper(read_mask_facts, masks), strict=True))
    known = Known(folder, listing.sidecars.found, sound_masks(listing.masks, facts, problems))
    items = []
    for pixels in mapper(read_pixels_of, [image.path for image in listing.images], progress):
        if not isinstance(pixels, Pixels):
            problems.append(pixels)
            continue
        item = known.item(pixels)
        if item.mask and (wrong := check_mask(item.mask, item.width, item.height)):
            problems.append(wrong)
        items.append(item)
    return Found(items, problems)


class Memory:
    """Remembers what a function said of a file, as long as the file's size and time of writing stay the same."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, Path], tuple[object, Any]] = {}

    def map(
        self, function: Callable[[Path], T], files: Sequence[Path], progress: Progress | None = None
    ) -> Iterator[T]:
        """As `workers.map_files`, for files that are not known yet."""
        stamps = {file: stamp_of(file) for file in files}
        known = {file: self._said.get((function.__name__, file)) for file in files}
        new = [file for file, said in known.items() if said is None or said[0] != stamps[file]]
        for file, result in zip(new, map_files(function, new, progress), strict=True):
            self._said[function.__name__, file] = stamps[file], result
        return iter([self._said[function.__name__, file][1] for file in files])


def stamp_of(file: Path) -> tuple[int, int] | None:
    """Size and time of writing, by which an unchanged file is known; None if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def state_of(folder: Path) -> str:
    """A word that changes when a file below a folder does; empty if there is no such folder."""
    if not folder.is_dir():
        return ""
    rows = [f"{os.fspath(file)}\n{stamp_of(file)}" for file in sorted(walk(folder, []))]
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()

"""Captions changed where they stand: in the text file beside an image, or in its line of a table.

A `Draft` collects new captions and turns them into changes of whole files, of which nothing but these captions differs.
A caption that somebody else has changed meanwhile is never overwritten.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import DataError, UserError
from ..trainer.files import atomic_file, locked, writable
from .captions import tidy
from .listing import Listed, Listing, list_images
from .sidecars import METADATA

_LOCK = ".lorasmith-undo.json.lock"
"""Held while files of a folder are changed."""

TEXT_SUFFIXES = (".txt", ".caption")
NO_CAPTION = ("none", "folder name")
_TABLE_KEYS = ("text", "caption")
"""In the order in which they are looked for in a line of `metadata.jsonl`."""


@dataclass(frozen=True)
class Change:
    """What a file holds before and after; None where it is not there."""

    file: Path
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True)
class TextFile:
    """A caption in a text file of its own, or the place for one."""

    file: Path


@dataclass(frozen=True)
class TableLine:
    """A caption in a line of `metadata.jsonl`."""

    file: Path
    line: int
    """From 1."""


@dataclass(frozen=True)
class Elsewhere:
    """A caption that cannot be changed here."""

    why: str


Place = TextFile | TableLine | Elsewhere


class ChangedMeanwhileError(UserError):
    """A caption is no longer what it was when it was shown."""

    def __init__(self, name: str, now: str) -> None:
        super().__init__("its caption was changed meanwhile, and what you wrote is not saved", name, "See it anew.")
        self.now = now


# ---------------------------------------------------------------------------------------------------------------------
# where a caption stands


def place_of(listing: Listing, image: Listed) -> Place:
    """Where the caption of an image is, or would be, written."""
    if image.source in NO_CAPTION:
        return _free_text_file(listing, image)
    file = image.path.with_name(image.source)
    if file.suffix.lower() in TEXT_SUFFIXES and file.is_file():
        return TextFile(file)
    if file.suffix.lower() == ".json":
        return Elsewhere(f"It stands in {image.source}, which is not changed here. Move its text to a .txt file.")
    return _table_line(listing.folder, image)


def text_file_of(path: Path, shares_stem: bool) -> Path:
    """Where a new caption goes; of images that differ in their suffix only, to a file for each, `a.png.txt`."""
    return path.with_name(f"{path.name if shares_stem else path.stem}.txt")


def _free_text_file(listing: Listing, image: Listed) -> Place:
    siblings = listing.sidecars.by_stem[image.path.with_suffix("")]
    file = text_file_of(image.path, shares_stem=len(siblings) > 1)
    if file.exists():  # and was not read as a caption
        return Elsewhere(f"{file.name} is there, but cannot be read. Save it as UTF-8 text, or remove it.")
    return TextFile(file)


def _table_line(folder: Path, image: Listed) -> Place:
    found = line_of(folder, image)
    if found and found.file.suffix == ".jsonl":
        line = found.file.read_bytes().split(b"\n")[found.line - 1]
        if _with_caption(line, "") is not None:
            return found
    return Elsewhere(_NOT_SIMPLE.format(source=image.source))


def line_of(folder: Path, image: Listed) -> TableLine | None:
    """The line of a table that the caption of an image comes from; None if it comes from no table."""
    name, _, line = image.source.partition(" line ")
    if name not in METADATA or not line.isdecimal():
        return None
    for parent in image.path.parents:
        table = TableLine(parent / name, int(line))
        if table.file.is_file() and _names(table, image.path):
            return table
        if parent == folder:
            break
    return None


_NOT_SIMPLE = "It stands in {source}, where none is written here. Change it in an editor."


def _names(table: TableLine, image: Path) -> bool:
    if table.file.suffix == ".csv":
        reader = csv.DictReader(table.file.read_text(encoding="utf-8-sig").splitlines(keepends=True))
        row = next((row for row in reader if reader.line_num == table.line), None)
    else:
        lines = table.file.read_bytes().split(b"\n")
        row = _row(lines[table.line - 1]) if table.line <= len(lines) else None
    return row is not None and os.path.normpath(table.file.parent / str(row.get("file_name"))) == os.path.normpath(
        image
    )


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _with_caption(line: bytes, caption: str) -> bytes | None:
    """A line of a table with another caption and all else as it was, byte for byte; None if that cannot be done."""
    row = _row(line)
    key = next((key for key in _TABLE_KEYS if row and key in row), None)
    if row is None or key is None or not isinstance(row[key], str):
        return None
    new = json.dumps(caption, ensure_ascii=line.isascii()).encode("utf-8")
    for found in re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode(), line):
        changed = line[: found.start(1)] + new + line[found.end(1) :]
        if _row(changed) == row | {key: caption}:  # else it stands in an inner object, or twice
            return changed
    return None


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees and writes


def text_of(listing: Listing, image: Listed) -> str:
    """A caption as it is shown in a box: the lines of its text file, for some read each as a caption of its own."""
    place = place_of(listing, image)
    if isinstance(place, TextFile) and place.file.is_file():
        return _lines(place.file.read_text(encoding="utf-8-sig"))
    return "\n".join(image.captions) if image.source != "folder name" else ""


def _lines(text: str) -> str:
    return "\n".join(tidy(line) for line in text.splitlines() if line.strip())


class Draft:
    """New captions for images of a listing, and the changes of files that they make."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._files: dict[Path, tuple[bytes | None, bytes | None]] = {}

    def write(self, image: Listed, text: str) -> None:
        """Give an image another caption.

        Raises:
            DataError: if its caption stands where none is written.
        """
        place = place_of(self.listing, image)
        if isinstance(place, Elsewhere):
            raise DataError("its caption cannot be changed here", image.name, place.why)
        before, now = self._files.get(place.file) or (bytes_of(place.file),) * 2
        if isinstance(place, TextFile):
            after = f"{_lines(text)}\n".encode()
        else:
            lines = (now or b"").split(b"\n")
            line = _with_caption(lines[place.line - 1], tidy(text))
            assert line is not None, "place_of has tried it"
            after = b"\n".join([*lines[: place.line - 1], line, *lines[place.line :]])
        self._files[place.file] = before, after

    def changes(self) -> list[Change]:
        """One for each file that becomes another."""
        return [Change(file, *bytes_) for file, bytes_ in self._files.items() if bytes_[0] != bytes_[1]]


def save_caption(folder: Path, name: str, shown: str, text: str) -> bool:
    """Write one caption, unless it is what stands there; whether a file was written.

    Args:
        shown: what stood there when the person began.

    Raises:
        ChangedMeanwhileError: if something else stands there now.
        DataError: if the image is gone, its caption stands where none is written, or the folder cannot be written.
    """
    _image(list_images(folder), name)  # nothing is written beside what has no such image, not even a lock
    with alone(folder):  # several captions may be in one file
        return _save_caption(list_images(folder), name, shown, text)


def _image(listing: Listing, name: str) -> Listed:
    if image := listing.image(name):
        return image
    raise DataError("is there no longer", name, "It was removed, or renamed, meanwhile.")


def _save_caption(listing: Listing, name: str, shown: str, text: str) -> bool:
    image = _image(listing, name)
    now, new = text_of(listing, image), _lines(text)
    if new == now:
        return False
    if now != shown:
        raise ChangedMeanwhileError(name, now)
    draft = Draft(listing)
    draft.write(image, new)
    for change in draft.changes():
        put(change.file, change.after)
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other page or process changes the folder.

    Raises:
        DataError: if it cannot be written.
    """
    if reason := writable(folder):
        raise DataError(reason, "captions and images", "Change its permissions, or work on a copy of it.")
    with locked(folder / _LOCK):
        yield


def put(file: Path, content: bytes | None) -> None:
    """Give a file this content; None: none of it is left."""
    if content is None:
        file.unlink(missing_ok=True)
    else:
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)


def bytes_of(file: Path) -> bytes | None:
    """What it holds; None if it is not there."""
    return file.read_bytes() if file.is_file() else None


def sharers(listing: Listing, image: Listed) -> Iterator[Listed]:
    """Other images whose caption is in the same text file, and changes with it."""
    place = place_of(listing, image)
    if not isinstance(place, TextFile):
        return
    for other in listing.images:
        if other.source == place.file.name and other.path.parent == image.path.parent and other != image:
            yield other

"""A folder of images to a list of items: caption, repeats, size, what was done to each. Nothing is skipped silently.

Captions come from `<image>.txt` or `<image>.caption` beside an image, from Hugging Face's `metadata.jsonl`
(`file_name` and `text`), or, for kohya's `10_name` folders, from the folder's name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import DataError, Problem
from ..trainer.files import sha256_of
from .captions import tidy
from .images import IMAGE_SUFFIXES, UNREAD_IMAGES, UnreadableImageError, read_rgb

SIDECAR_SUFFIXES = (".txt", ".caption")
UNREAD_SIDECARS = (".json", ".tags", ".cap", ".captions")
METADATA = "metadata.jsonl"
UNREAD_METADATA = ("metadata.csv", "metadata.parquet")
MOST_REPEATS = 500
_ABOUT_THE_FOLDER = {"readme", "license", "licence", "notice", "copying", "attribution", "credits", "requirements"}
_REPEATS = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Item:
    """One image with its caption."""

    path: Path
    sha256: str
    """Of the file's bytes: an edited image is another image."""
    width: int
    height: int
    """Upright size in pixels, after EXIF orientation."""
    caption: str
    """As found, before the trigger word; may be empty."""
    source: str
    """Where the caption comes from, e.g. `cat.txt`, `metadata.jsonl line 3`, `folder name`, or `none`."""
    repeats: int = 1
    notes: tuple[str, ...] = ()
    """What was done to the image, e.g. `rotated by EXIF orientation 6`."""


def scan(folder: Path) -> list[Item]:
    """All images under a folder, sorted by path.

    Raises:
        DataError: every unusable file at once: no folder, no images, unreadable images, captions that would be ignored.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of images" if folder.is_file() else "there is no such folder"
        raise DataError(what, str(folder), "Set data.path to the folder that holds your images.")
    problems: list[Problem] = []
    files = sorted(_walk(folder, problems))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError.of([_no_images(folder, files), *problems])
    problems += _ignored(folder, files, images)
    captions = _Captions(images, problems).read(files)
    items = [item for image in images if (item := _item(folder, image, captions.get(image), problems))]
    if problems:
        raise DataError.of(problems)
    return items


def _walk(folder: Path, problems: list[Problem]) -> list[Path]:
    """All files, without hidden ones and the folders that systems and tools leave behind; each folder once."""

    def cannot_open(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"cannot be opened ({error.strerror})", "Change its permissions."))

    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=cannot_open, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:  # a link has led back
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "@")) and name != "__MACOSX")
        found += [Path(parent, name) for name in names if not name.startswith(".") and name != "Thumbs.db"]
    return found


def _no_images(folder: Path, files: list[Path]) -> Problem:
    found = Counter(file.suffix.lower() or "no suffix" for file in files)
    seen = ", ".join(f"{count} x {suffix}" for suffix, count in found.most_common(5)) or "it is empty"
    return Problem(str(folder), f"holds no images ({seen})", f"Known are {', '.join(sorted(IMAGE_SUFFIXES))}.")


def _ignored(folder: Path, files: list[Path], images: list[Path]) -> Iterator[Problem]:
    """Files and folders that a person may take for a part of the data, and that are none."""
    read = {image.with_suffix("") for image in images}
    for file in files:
        if file.suffix.lower() in UNREAD_IMAGES and file.with_suffix("") not in read:  # else the source of an export
            yield Problem(
                str(file), "is a kind of image that is not read", "Save it as PNG or JPEG, or move it elsewhere."
            )
        elif file.name in UNREAD_METADATA:
            yield Problem(
                str(file),
                f"looks like captions, but {file.suffix} tables are not read",
                f"Write them to {METADATA}, or to a .txt file beside each image; then remove it.",
            )
    kohya_folders = {kohya for image in images if (kohya := _kohya_folder(folder, image))}
    for kohya in sorted(kohya for kohya in kohya_folders if _repeats_of(kohya) == 0):
        yield Problem(
            str(kohya),
            "asks for 0 repeats, so its images would never be shown",
            "Rename it to begin with another number, or move it elsewhere.",
        )


def _item(folder: Path, image: Path, caption: tuple[str, str] | None, problems: list[Problem]) -> Item | None:
    """An image with all that is known of it; or None, with its problem added to the list."""
    try:
        sha256, (picture, notes) = sha256_of(image), read_rgb(image)
    except UnreadableImageError as error:
        problems.append(Problem(str(image), f"cannot be read as an image ({error})", "Save it again or remove it."))
        return None
    except OSError as error:
        problems.append(_cannot_be_read(image, error))
        return None
    kohya = _kohya_folder(folder, image)
    class_name = tidy(kohya.name.partition("_")[2].replace("_", " ")) if kohya else ""
    text, source = caption or (class_name, "folder name" if class_name else "none")
    return Item(
        path=image,
        sha256=sha256,
        width=picture.width,
        height=picture.height,
        caption=text,
        source=source,
        repeats=_repeats_of(kohya) if kohya else 1,
        notes=notes,
    )


def _kohya_folder(folder: Path, image: Path) -> Path | None:
    """The nearest `10_name` folder above an image.

    A number over 500 is no repeats but a date or a year, as in `2024_summer`, which nobody meant to show 2024 times.
    """
    for parent in image.parents:
        if _REPEATS.fullmatch(parent.name) and _repeats_of(parent) <= MOST_REPEATS:
            return parent
        if parent == folder:
            break
    return None


def _repeats_of(kohya_folder: Path) -> int:
    return int(kohya_folder.name.partition("_")[0])


def _cannot_be_read(file: Path, error: OSError) -> Problem:
    return Problem(str(file), f"cannot be read ({error.strerror})", "Change its permissions or remove it.")


# ---------------------------------------------------------------------------------------------------------------------
# captions


class _Captions:
    """Captions by image as (text, source); what would have been ignored is added to the list of problems."""

    def __init__(self, images: Iterable[Path], problems: list[Problem]) -> None:
        self.problems = problems
        self.found: dict[Path, tuple[str, str]] = {}
        self.by_path: dict[str, Path] = {}
        self.by_stem: dict[Path, list[Path]] = {}
        for image in images:
            self.by_path[os.path.normpath(image)] = image
            self.by_stem.setdefault(image.with_suffix(""), []).append(image)

    def read(self, files: list[Path]) -> dict[Path, tuple[str, str]]:
        """The captions that metadata and sidecars hold."""
        for file in files:
            if file.name == METADATA:
                self._read_metadata(file)
        for file in files:
            suffix, owners = file.suffix.lower(), self._owners(file)
            if suffix in SIDECAR_SUFFIXES and owners:
                self._read_sidecar(file, owners)
            elif suffix in SIDECAR_SUFFIXES and file.stem.lower() not in _ABOUT_THE_FOLDER:
                self._problem(
                    file,
                    "is a caption without an image, so it would be ignored",
                    "Give it the name of its image, or remove it.",
                )
            elif suffix in UNREAD_SIDECARS and owners:
                self._problem(
                    file,
                    f"looks like a caption, but {suffix} files are not read",
                    "Move its text to a .txt file, or remove it.",
                )
        return self.found

    def _owners(self, sidecar: Path) -> list[Path]:
        """The image whose whole name stands before the sidecar's suffix, as in `a.png.txt`; or all of its stem."""
        name = sidecar.with_suffix("")
        exact = self.by_path.get(os.path.normpath(name))
        return [exact] if exact else self.by_stem.get(name, [])

    def _read_sidecar(self, file: Path, owners: list[Path]) -> None:
        text = self._text(file)
        if text is None:
            return
        for image in owners:
            if image in self.found:
                self._problem(
                    file,
                    f"{image.name} has a caption in {self.found[image][1]} already",
                    "Keep one of the two; the other would be ignored.",
                )
            else:
                self.found[image] = (tidy(text), file.name)

    def _read_metadata(self, file: Path) -> None:
        """Hugging Face imagefolder: one JSON object a line with `file_name` and `text`."""
        for number, line in enumerate((self._text(file) or "").split("\n"), start=1):
            if line.strip():
                self._read_row(file, number, line)

    def _read_row(self, file: Path, number: int, line: str) -> None:
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
            name, text = row["file_name"], row.get("text", row.get("caption"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            self._problem(where, "is not a JSON object with a file_name", "Mend or remove the line.")
            return
        image = self.by_path.get(os.path.normpath(file.parent / str(name)))
        if image is None:
            self._problem(where, f"names {name!r}, which is no image here", "Mend or remove the line.")
        elif not isinstance(text, str):
            self._problem(where, 'has no "text"', 'Add "text": "the caption".')
        elif image in self.found:
            self._problem(where, f"is a second caption for {name}", "Keep one of the two.")
        else:
            self.found[image] = (tidy(text), f"{METADATA} line {number}")

    def _text(self, file: Path) -> str | None:
        """What a text file holds; None, with a problem, if it cannot be read."""
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self._problem(file, f"is not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8.")
        except OSError as error:
            self.problems.append(_cannot_be_read(file, error))
        return None

    def _problem(self, where: Path | str, what: str, fix: str) -> None:
        self.problems.append(Problem(str(where), what, fix))

"""A folder of images to a list of items: caption, repeats, size, what was done to each. Nothing is skipped silently.

Captions come from `<image>.txt` or `<image>.caption` beside an image, from Hugging Face's `metadata.jsonl`
(`file_name` and `text`), or, for kohya's `10_name` folders, from the folder's name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import DataError, Problem
from ..trainer.files import sha256_of
from .captions import tidy
from .images import IMAGE_SUFFIXES, UnreadableImageError, read_rgb

SIDECAR_SUFFIXES = (".txt", ".caption")
UNREAD_SIDECARS = (".json", ".tags", ".cap", ".captions")
METADATA = "metadata.jsonl"
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
    files = sorted(_walk(folder))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = Counter(file.suffix.lower() or "no suffix" for file in files)
        seen = ", ".join(f"{count} x {suffix}" for suffix, count in found.most_common(5)) or "it is empty"
        raise DataError(f"holds no images ({seen})", str(folder), f"Known are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    captions, problems = _read_captions(files, images)
    items = []
    for image in images:
        try:
            items.append(_item(folder, image, captions.get(image)))
        except UnreadableImageError as error:
            problems.append(Problem(str(image), f"cannot be read as an image ({error})", "Save it again or remove it."))
        except PermissionError:
            problems.append(Problem(str(image), "may not be read", "Change its permissions or remove it."))
    if problems:
        raise DataError.of(problems)
    return items


def _walk(folder: Path) -> list[Path]:
    """All files, without hidden ones and the folders that systems and tools leave behind."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "@")) and name != "__MACOSX"]
        found += [Path(parent, name) for name in names if not name.startswith(".") and name != "Thumbs.db"]
    return found


def _item(folder: Path, image: Path, caption: tuple[str, str] | None) -> Item:
    picture, notes = read_rgb(image)
    repeats, class_name = _kohya_folder(folder, image)
    text, source = caption or (class_name, "folder name" if class_name else "none")
    return Item(
        path=image,
        sha256=sha256_of(image),
        width=picture.width,
        height=picture.height,
        caption=text,
        source=source,
        repeats=repeats,
        notes=notes,
    )


def _kohya_folder(folder: Path, image: Path) -> tuple[int, str]:
    """Repeats and class name of the nearest `10_name` folder above an image; 1 and no name without one."""
    for parent in image.parents:
        if match := _REPEATS.fullmatch(parent.name):
            return max(int(match[1]), 1), tidy(match[2].replace("_", " "))
        if parent == folder:
            break
    return 1, ""


# ---------------------------------------------------------------------------------------------------------------------
# captions


def _read_captions(files: list[Path], images: list[Path]) -> tuple[dict[Path, tuple[str, str]], list[Problem]]:
    """Captions by image as (text, source), and everything that would have been ignored."""
    captions: dict[Path, tuple[str, str]] = {}
    problems: list[Problem] = []
    for file in files:
        if file.name == METADATA:
            _read_metadata(file, set(images), captions, problems)
    by_stem: dict[tuple[Path, str], list[Path]] = {}
    for image in images:
        by_stem.setdefault((image.parent, image.stem), []).append(image)
    for file in files:
        suffix = file.suffix.lower()
        owners = by_stem.get((file.parent, file.stem), []) or by_stem.get((file.parent, Path(file.stem).stem), [])
        if suffix in SIDECAR_SUFFIXES:
            _read_sidecar(file, owners, captions, problems)
        elif suffix in UNREAD_SIDECARS and owners:
            problems.append(
                Problem(
                    str(file),
                    f"looks like a caption, but {suffix} files are not read",
                    "Move its text to a .txt file, or remove it.",
                )
            )
    return captions, problems


def _read_sidecar(
    file: Path, owners: list[Path], captions: dict[Path, tuple[str, str]], problems: list[Problem]
) -> None:
    if not owners:
        if file.stem.lower() not in _ABOUT_THE_FOLDER:
            problems.append(
                Problem(
                    str(file),
                    "is a caption without an image, so it would be ignored",
                    "Give it the name of its image, or remove it.",
                )
            )
        return
    try:
        text = tidy(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        problems.append(
            Problem(str(file), f"is not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8.")
        )
        return
    for image in owners:
        if image in captions:
            problems.append(
                Problem(
                    str(file),
                    f"{image.name} has a caption in {captions[image][1]} already",
                    "Keep one of the two; the other would be ignored.",
                )
            )
        else:
            captions[image] = (text, file.name)


def _read_metadata(
    file: Path, images: set[Path], captions: dict[Path, tuple[str, str]], problems: list[Problem]
) -> None:
    """Hugging Face imagefolder: one JSON object a line with `file_name` and `text`."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
            name, text = row["file_name"], row.get("text", row.get("caption"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            problems.append(Problem(where, "is not a JSON object with a file_name", "Mend or remove the line."))
            continue
        image = Path(os.path.normpath(file.parent / str(name)))
        if image not in images:
            problems.append(Problem(where, f"names {name!r}, which is no image here", "Mend or remove the line."))
        elif not isinstance(text, str):
            problems.append(Problem(where, 'has no "text"', 'Add "text": "the caption".'))
        elif image in captions:
            problems.append(Problem(where, f"is a second caption for {name}", "Keep one of the two."))
        else:
            captions[image] = (tidy(text), f"{METADATA} line {number}")

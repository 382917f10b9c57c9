"""Files that came through a browser become a folder of images: `<runs>/.uploads/<name>/`.

Their names come from anybody, so that none of them can lead elsewhere, hide, or take the place of another.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..trainer.errors import DataError, Problem
from ..trainer.files import atomic_file, atomic_folder, locked, remove_leftovers
from .archives import Archive
from .images import IMAGE_SUFFIXES
from .sidecars import METADATA, SIDECAR_SUFFIXES

UPLOADS = ".uploads"
EXAMPLE = "blueprint"
"""Thirty-two drawings in one style, with captions, that come with the program."""
_EXAMPLES = Path(__file__).parent / "examples"
_UNSAFE = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
_LONGEST = 120


@dataclass(frozen=True)
class Received:
    """What became of an upload."""

    folder: Path
    taken: int
    """Files that are in the folder now."""
    left_out: list[Problem]


def receive(files: Sequence[Path], uploads: Path, into: Path | None = None) -> Received:
    """Move uploaded files to a new folder, or to one of earlier uploads; a single .zip always gets a folder of its own.

    Raises:
        DataError: if none of them is an image or a caption, or the archive is refused.
    """
    uploads.parent.mkdir(parents=True, exist_ok=True)
    with locked(uploads.with_suffix(".lock")):  # two tabs at once must not find the same name free
        return _receive(files, uploads, into)


def _receive(files: Sequence[Path], uploads: Path, into: Path | None) -> Received:
    remove_leftovers(uploads)
    zips = [file for file in files if file.suffix.lower() == ".zip"]
    if zips and len(files) > 1:
        raise DataError("comes with other files", zips[0].name, "Give an archive by itself, or its files unpacked.")
    if zips:
        return _unpack(zips[0], uploads)
    wanted = {file: problem for file in files for problem in [_reason_to_leave_out(file, into)]}
    left_out = [problem for problem in wanted.values() if problem]
    taken = [file for file, problem in wanted.items() if not problem]
    if not taken:
        raise DataError.of(left_out or [Problem("upload", "no file came", "Choose images, captions, or one .zip.")])
    if into:
        _move(taken, into)
        return Received(into, len(taken), left_out)
    folder = free_folder(uploads, "images")
    with atomic_folder(folder, replace=False) as temporary:
        _move(taken, temporary)
    return Received(folder, len(taken), left_out)


def example_images(uploads: Path) -> Path:
    """The example's images, as a copy whose captions can be changed; an earlier copy stays in use."""
    folder = uploads / EXAMPLE
    if not folder.is_dir():
        with atomic_folder(folder, replace=False) as temporary:
            shutil.copytree(_EXAMPLES / EXAMPLE, temporary, dirs_exist_ok=True)
    return folder


def free_folder(parent: Path, name: str) -> Path:
    """A folder below `parent` that is not there yet, named after `name`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    short = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "images"
    number, folder = 1, parent / short
    while folder.exists():
        number += 1
        folder = parent / f"{short}-{number}"
    return folder


def _unpack(archive: Path, uploads: Path) -> Received:
    folder = free_folder(uploads, archive.stem)
    with atomic_folder(folder, replace=False) as temporary:
        Archive(archive, archive.name).write(temporary, lambda _done, _total: None)
        count = sum(file.is_file() for file in temporary.rglob("*"))
    archive.unlink(missing_ok=True)
    return Received(folder, count, [])


def _reason_to_leave_out(file: Path, into: Path | None) -> Problem | None:
    name = file.name
    if name in METADATA:
        if into and (into / name).exists():
            return Problem(name, "is there already", "Put its lines into the one that is there.")
        return None
    if file.suffix.lower() in {*IMAGE_SUFFIXES, *SIDECAR_SUFFIXES}:
        return None
    return Problem(name, "is neither an image nor a caption, and was left out", f"Known are {', '.join(_known())}.")


def _known() -> Iterable[str]:
    return (*sorted(IMAGE_SUFFIXES), *SIDECAR_SUFFIXES, *METADATA, ".zip")


def _move(files: Sequence[Path], folder: Path) -> None:
    """Under safe names. An image and the caption that came with it keep a common stem; one that comes alone joins the
    other where it has waited for it."""
    kinds = [IMAGE_SUFFIXES, SIDECAR_SUFFIXES]
    there = [file.name for file in folder.iterdir()]
    names, stems = set(map(_key, there)), {_key(Path(name).stem) for name in there}
    came_as: dict[str, list[str]] = {}  # the stems that files of a stem were given, in order
    for suffixes in kinds:
        alike = {_key(Path(name).stem) for name in there if Path(name).suffix.lower() in suffixes}
        for file in (file for file in files if file.suffix.lower() in suffixes):
            stem, suffix = _safe_parts(file.name)
            given = came_as.setdefault(_key(stem), [])
            target = next((one for one in given if _key(one + suffix) not in names), None)
            if target is None:
                target = stem if not given and _key(stem) not in alike else _free(stem, stems)
                given.append(target)
            stems.add(_key(target))
            names.add(_key(target + suffix))
            _take(file, folder / (target + suffix))
    for file in files:
        if file.name in METADATA:
            _take(file, folder / file.name)


def _take(file: Path, target: Path) -> None:
    """Move a file, maybe to another disk; no half of it ever has the name."""
    with atomic_file(target) as temporary:
        shutil.move(file, temporary)


def _safe_parts(name: str) -> tuple[str, str]:
    path = Path(safe_name(name))
    return path.stem, path.suffix.lower()


def safe_name(name: str) -> str:
    """A file's name without a folder, that no system takes for a hidden file, a device, or anything else but a name."""
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    plain = _UNSAFE.sub("_", last).rstrip(" .")
    stem, dot, suffix = plain.rpartition(".")
    stem = (stem if dot else plain).strip(" .")[:_LONGEST].strip(" .") or "image"
    stem = f"_{stem}" if _DEVICES.fullmatch(stem) or stem.startswith("@") else stem
    return f"{stem}.{suffix}" if dot else stem


def _free(stem: str, taken: set[str]) -> str:
    number, name = 1, stem
    while _key(name) in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def _key(name: str) -> str:
    """As a disk sees it that does not tell case."""
    return unicodedata.normalize("NFC", name).casefold()

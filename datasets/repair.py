"""A mended copy of a folder: upright sRGB pictures without bars, each once, with tidy captions. Nothing is enlarged.

The original is only read. `fixes.json` in the copy tells what was done to each file, and what was left out and why.
Masks go along as `mask/<name>.png`, cropped as their images are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..trainer.errors import DataError, UserError
from ..trainer.files import atomic_folder
from .checks import Examination, alike, same_files
from .folder import Item, kohya_folder, look
from .images import formats_here, read_grey, read_rgb
from .machine import append, entry_of, read_record
from .photometry import Borders
from .sidecars import Lines

RECORD = "fixes.json"
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_JPEG_QUALITY = 95
_NO_CAPTION = "none"
"""Stands in place of a source where there is no caption. A folder's name is written out: the copy's may be another."""


@dataclass(frozen=True)
class Mend:
    """One image of the copy."""

    item: Item
    name: str
    """Below the original folder."""
    target: PurePosixPath
    """Below the copy."""
    borders: Borders
    done: tuple[str, ...]


@dataclass(frozen=True)
class Repairs:
    """What the copy holds, and what it does not."""

    mends: list[Mend]
    left_out: dict[str, str]
    """By name, why."""

    def __str__(self) -> str:
        counts = self.facts()
        cropped = f"{counts['cropped']} of them cropped"
        return f"{counts['images']} images, {cropped}; {counts['left_out']} files left out ({RECORD} says why)"

    def facts(self) -> dict[str, int]:
        """For machines; `fixes.json` has it by file."""
        cropped = sum(bool(mend.borders) for mend in self.mends)
        return {"images": len(self.mends), "cropped": cropped, "left_out": len(self.left_out)}


def check_place(folder: Path, out: Path) -> None:
    """The copy goes to a folder of its own.

    Raises:
        UserError: if there is something in it, or one of the two lies within the other.
    """
    original, copy = folder.resolve(), out.resolve()
    if original.is_relative_to(copy) or copy.is_relative_to(original):
        raise UserError(f"the copy would lie in {folder}, or around it", str(out), "Name a folder elsewhere.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists already, and is not empty", str(out), "Name a new folder.")


# ---------------------------------------------------------------------------------------------------------------------
# what to do


def plan_repairs(examination: Examination) -> Repairs:
    """Unusable files and further copies are left out; of pictures that are nearly the same the largest stays."""
    folder = examination.folder
    left_out = {finding.where: finding.what for finding in examination.findings if finding.check == "unusable"}
    for item in examination.items:
        if reason := _reason_to_leave_out(item, folder, left_out):
            left_out.setdefault(_below(folder, item.path), reason)
    usable = [item for item in examination.items if _below(folder, item.path) not in left_out]
    kept = {item.path: item for item in usable}
    doubles = [("is the same file as", group) for group in same_files(usable)]
    doubles += [("is nearly the same picture as", group) for group in alike(usable, examination.measures)]
    for reason, group in doubles:
        first, *others = [kept[item.path] for item in group]
        kept[first.path] = _with_a_caption(first, others)
        for other in others:
            del kept[other.path]
            left_out[_below(folder, other.path)] = f"{reason} {_below(folder, first.path)}"
    repeated = [folder.name] if kohya_folder(folder, folder / "image") else []  # else its repeats would be lost
    targets = _targets([PurePosixPath(*repeated, _below(folder, path)) for path in kept])
    mends = [
        _mend(item, _below(folder, item.path), target, examination.measures[item.path].borders)
        for item, target in zip(kept.values(), targets, strict=True)
    ]
    return Repairs(mends, left_out)


def _reason_to_leave_out(item: Item, folder: Path, refused: Mapping[str, str]) -> str:
    """Why an image cannot be used: for itself, its mask, or a folder it lies in; empty if it can."""
    for path in [item.path, *([item.mask.path] if item.mask else []), *item.path.parents]:
        if path.is_relative_to(folder) and (reason := refused.get(_below(folder, path))):
            return reason if path == item.path else f"{_below(folder, path)} {reason}"
    return ""


def _with_a_caption(item: Item, others: Sequence[Item]) -> Item:
    """The one that is kept, with the words of one that is not if it has none itself."""
    for other in [] if any(item.captions) else others:
        if any(other.captions):
            return replace(item, captions=other.captions, source=other.source, machine=False)
    return item


def _targets(names: Sequence[PurePosixPath]) -> Iterator[PurePosixPath]:
    """JPEG stays JPEG, all else becomes PNG. No two differ in their suffix or in case only, so captions are unique."""
    stems = {str(name.with_suffix("")).lower() for name in names}
    taken = {PurePosixPath(RECORD).stem}
    for name in names:
        suffix = ".jpg" if name.suffix.lower() in _JPEG_SUFFIXES else ".png"
        stem, number = name.with_suffix(""), 1
        while str(stem).lower() in taken:
            number += 1
            numbered = name.with_name(f"{name.stem}-{number}")
            stem = numbered if str(numbered).lower() not in stems else stem
        taken.add(str(stem).lower())
        yield stem.with_name(stem.name + suffix)


def _mend(item: Item, name: str, target: PurePosixPath, borders: Borders) -> Mend:
    done = [*item.notes, "metadata stripped"]
    if borders:
        done.append(f"bars cropped off: {borders}")
    if str(target) != name:
        done.append(f"saved as {target}")
    if item.source != _NO_CAPTION:
        done.append(f"caption from {item.source}")
    if item.mask:
        done.append("mask cropped likewise" if borders else "mask copied")
    return Mend(item, name, target, borders, tuple(done))


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# doing it


def write_copy(examination: Examination, out: Path, progress: Callable[[int, int], None]) -> Repairs:
    """Write the mended copy, look at it as training would, and only then give it its name.

    Raises:
        DataError: if no image is left, or the copy cannot be used itself.
    """
    check_place(examination.folder, out)
    repairs = plan_repairs(examination)
    if not repairs.mends:
        raise DataError("no image here can be used, so there is nothing to copy", str(examination.folder))
    if out.exists():
        out.rmdir()  # empty, as was checked
    with atomic_folder(out, replace=False) as copy:
        for done, mend in enumerate(repairs.mends):
            progress(done, len(repairs.mends))
            _write(mend, copy, examination.lines)
        (copy / RECORD).write_text(_record(examination.folder, repairs), encoding="utf-8", newline="\n")
        _check_copy(copy, out, len(repairs.mends), examination.lines)
    progress(len(repairs.mends), len(repairs.mends))
    return repairs


def _write(mend: Mend, copy: Path, lines: Lines) -> None:
    target = copy / mend.target
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_picture(mend, target)
    if mend.item.mask:
        _write_mask(mend, mend.item.mask.path, target.parent / "mask" / f"{target.stem}.png")
    if mend.item.source != _NO_CAPTION:
        _write_captions(mend.item, target, lines)


def _write_picture(mend: Mend, target: Path) -> None:
    """A JPEG file of which nothing is changed keeps its own quantisation, which changes its pixels least."""
    item = mend.item
    if target.suffix == ".jpg" and not item.notes and not mend.borders:
        with Image.open(item.path, formats=formats_here()) as file:
            if file.format == "JPEG":
                file.load()
                _without_metadata(file).save(target, "JPEG", quality="keep")
                return
    image = read_rgb(item.path)[0].crop(mend.borders.inside(item.width, item.height))
    settings: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0} if target.suffix == ".jpg" else {}
    _without_metadata(image).save(target, **settings)


def _without_metadata(image: Image.Image) -> Image.Image:
    """Pillow would write profile, comment and more again."""
    image.info = {}
    return image


def _write_mask(mend: Mend, mask: Path, target: Path) -> None:
    image, item = read_grey(mask), mend.item
    across, down = image.width / item.width, image.height / item.height
    left, top, right, bottom = mend.borders.inside(item.width, item.height)
    box = round(left * across), round(top * down), round(right * across), round(bottom * down)
    target.parent.mkdir(exist_ok=True)
    _without_metadata(image.crop(box)).save(target)


def _write_captions(item: Item, image: Path, lines: Lines) -> None:
    """One a line; where lines would be joined, variants go to a JSON list, so that they stay variants."""
    target = image.with_suffix(".txt")
    if len(item.captions) == 1 or lines == "variants":
        target.write_text("\n".join(item.captions) + "\n", encoding="utf-8", newline="\n")
    else:
        target = image.with_suffix(".json")
        target.write_text(json.dumps(item.captions, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    entry = read_record(item.path.parent).get(item.source) if item.machine else None
    if entry:
        append(image.parent, entry_of(target.name, item.captions[0], entry.model, entry.kind))


def _record(folder: Path, repairs: Repairs) -> str:
    files = [{"file": m.name, "written": str(m.target), "done": list(m.done)} for m in repairs.mends]
    files += [{"file": name, "written": None, "done": [f"left out: {why}"]} for name, why in repairs.left_out.items()]
    return json.dumps({"copy_of": str(folder.absolute()), "files": files}, indent=2, ensure_ascii=False) + "\n"


def _check_copy(copy: Path, out: Path, images: int, lines: Lines) -> None:
    """What was written is read back as training will read it."""
    found = look(copy, lines)
    for problem in found.problems:
        where = problem.where.replace(str(copy), str(out))
        raise DataError(f"the copy has a problem of its own: {problem.what}", where, "Please report this.")
    if len(found.items) != images:
        raise DataError(
            f"{images} images were written, and {len(found.items)} are read", str(out), "Please report this."
        )

"""Images taken out of a folder with all that belongs to them: they move to `.removed/`, and can be brought back."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..trainer.errors import DataError, UserError
from .editing import Change, line_of
from .journal import REMOVED, Deed, Move, carry_out
from .listing import Listed, Listing, list_images
from .sidecars import METADATA, SIDECAR_SUFFIXES


def remove_images(folder: Path, names: Sequence[str]) -> str:
    """Take images out, with their captions and masks; what was done, in a few words.

    Lines about them in `metadata.jsonl` and `metadata.csv` are taken out as well, else training would ask for them.

    Raises:
        UserError: if one of them is not there.
    """
    listing = list_images(folder)
    images = [_image(listing, name) for name in names]
    what = f"removed {names[0]}" if len(names) == 1 else f"removed {len(names)} images"
    files = [file for image in images for file in (image.path, *_companions(listing, image, images))]
    _carry_out(listing, what, list(dict.fromkeys(files)), images)
    return what


def remove_file(folder: Path, name: str) -> str:
    """Take out a file that is no image that can be used, such as a caption without one.

    Raises:
        UserError: if it is not there, or lies outside of the folder.
    """
    listing = list_images(folder)
    if listing.image(name):
        return remove_images(folder, [name])
    file = folder / name
    if file not in listing.files:
        raise UserError("is there no longer", name, "Look at the folder again.")
    what = f"removed {name}"
    _carry_out(listing, what, [file], [])
    return what


def _image(listing: Listing, name: str) -> Listed:
    image = listing.image(name)
    if image is None:
        raise UserError("is there no longer", name, "It was removed, or renamed, meanwhile.")
    return image


def _companions(listing: Listing, image: Listed, removed: Sequence[Listed]) -> list[Path]:
    """Captions and masks that would belong to no image any longer."""
    path, going = image.path, {other.path for other in removed}
    stem = path.with_suffix("")
    named = [path.with_name(path.name + suffix) for suffix in SIDECAR_SUFFIXES]
    shared = [stem.with_name(stem.name + suffix) for suffix in SIDECAR_SUFFIXES]
    stays = [other for other in listing.sidecars.by_stem[stem] if other not in going]
    found = [file for file in listing.files if file in {*named, *([] if stays else shared)}]
    mask = listing.masks.get(path)
    if mask and not any(other not in going and theirs == mask for other, theirs in listing.masks.items()):
        found.append(mask)
    return found


def _carry_out(listing: Listing, what: str, files: Sequence[Path], images: Sequence[Listed]) -> None:
    taken: set[Path] = set()
    moves = [Move(file, _free(listing.folder, file, taken)) for file in files]
    tables = [file for file in listing.files if file.name in METADATA and file not in files]
    changes = [change for table in tables if (change := _without(listing.folder, table, images))]
    carry_out(listing.folder, Deed(what, changes, moves))


def _free(folder: Path, file: Path, taken: set[Path]) -> Path:
    """A place below `.removed/`, numbered if an earlier file of this name lies there."""
    place = folder / REMOVED / file.relative_to(folder)
    number, target = 1, place
    while target.exists() or target in taken:
        number += 1
        target = place.with_name(f"{place.stem}-{number}{place.suffix}")
    taken.add(target)
    return target


def _without(folder: Path, table: Path, images: Sequence[Listed]) -> Change | None:
    """A table without the lines of these images; None if it has none of them."""
    found = [line_of(folder, image) for image in images]
    numbers = {line.line for line in found if line and line.file == table}
    if not numbers:
        return None
    before = table.read_bytes()
    lines = before.split(b"\n")
    after = b"\n".join(line for number, line in enumerate(lines, start=1) if number not in numbers)
    if table.suffix == ".csv" and _rows(after) != [row for number, row in _numbered(before) if number not in numbers]:
        what = "has a caption of several lines, which cannot be taken out here"
        raise DataError(what, str(table), "Take it out in a table editor, and remove the image by hand.")
    return Change(table, before, after)


def _rows(table: bytes) -> list[list[str]]:
    return [row for _, row in _numbered(table)]


def _numbered(table: bytes) -> Iterator[tuple[int, list[str]]]:
    """The rows, each with the number of the line in which it ends."""
    reader = csv.reader(table.decode("utf-8-sig").splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, row

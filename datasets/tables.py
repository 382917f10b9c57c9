"""A table with a column of images to a folder: the images as they are, byte for byte, and a metadata.jsonl.

Which column is the image and which the caption is told by types and names, or by the person: `?image=NAME&text=NAME`.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..trainer.errors import DataError, Problem, first_line
from ..trainer.files import sha256_of
from .archives import MOST_BYTES, MOST_ENTRIES
from .images import DECODING_ERRORS, IMAGE_SUFFIXES
from .workers import Progress

IMAGE_COLUMNS = {"image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo"}
TEXT_COLUMNS = {"text", "caption", "captions", "prompt", "txt", "description"}
SUFFIXES = {
    **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"},
    **{"BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif", "AVIF": ".avif"},
}
"""Of Pillow's formats."""
ENOUGH = 100
"""Rows with a problem, after which the rest is not read."""
_ROWS_AT_ONCE = 4  # a small file can hold a large image a thousand times
_SHARD = re.compile(r"(?:^|[-_.])(?P<number>\d+)(?:[-_.]of[-_.](?P<of>\d+))?$")
"""The end of the name of one of several files that are a table together: `train-00000-of-00002`, `0003`."""


def library(name: str, written: str = "") -> Any:
    """A module that comes with an extra, to read what was `written`; by name, for so is this folder called.

    Raises:
        DataError: if it is not installed, or something else goes by its name.
    """
    package = name.partition(".")[0]
    fix = "Run: pip install lorasmith[huggingface]"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{package} cannot be imported ({first_line(error)}), which reads such data", written, fix
        ) from error
    if package == "datasets" and not hasattr(module, "load_dataset"):
        if file := getattr(module, "__file__", None):
            fix = f"{file} goes by its name: start in another folder, or rename that file."
        raise DataError("Hugging Face's datasets is not installed, which reads such data", written, fix)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# columns


@dataclass(frozen=True)
class Columns:
    """Which column is which."""

    image: str
    text: str | None
    """None: the images have no captions."""

    @property
    def names(self) -> list[str]:
        return [self.image, self.text] if self.text else [self.image]


def choose_columns(schema: Any, asked: Mapping[str, str], written: str) -> Columns:
    """The columns that were asked for; else, for each, the only one whose type and name fit.

    Args:
        schema: a `pyarrow.Schema`, to which Hugging Face's features can be turned as well.
        asked: names under `image` and `text`; an empty `text` asks for none.

    Raises:
        DataError: if none fits or several do; it lists all columns.
    """
    image = _column(schema, asked, written, "image", "images", _holds_images, _is_known_for_images)
    text = None
    if asked.get("text") != "":
        text = _column(schema, asked, written, "text", "captions", _holds_texts, _is_known_for_texts)
    problems = [found for found in (image, text) if isinstance(found, Problem)]
    if isinstance(image, Problem) or isinstance(text, Problem):
        raise DataError.of(problems)
    return Columns(image, text)


def _column(
    schema: Any,
    asked: Mapping[str, str],
    written: str,
    key: str,
    what: str,
    holds: Callable[[Any], bool],
    is_known: Callable[[Any], bool],
) -> str | Problem:
    """The column of one kind, or why it cannot be told."""
    listed = f"The columns are: {', '.join(f'{field.name} ({field.type})' for field in schema) or 'none'}."
    if name := asked.get(key):
        types = [field.type for field in schema if field.name == name]
        if len(types) != 1:
            return Problem(written, f"has {len(types) or 'no'} columns {name!r}", listed)
        return name if holds(types[0]) else Problem(written, f"its column {name!r} does not hold {what}", listed)
    names = [field.name for field in schema if is_known(field)]
    if len(names) == 1:
        return names[0]
    several = f"has several columns that may hold {what} ({', '.join(names)})"
    fix = f"Put ?{key}=COLUMN after the path" + (", or ?text= for no captions." if key == "text" else ".")
    return Problem(written, several if names else f"has no column that is known to hold {what}", f"{fix} {listed}")


def _is_known_for_images(field: Any) -> bool:
    return _is_struct_of_bytes(field.type) or (_is_binary(field.type) and field.name.lower() in IMAGE_COLUMNS)


def _is_known_for_texts(field: Any) -> bool:
    return _holds_texts(field.type) and field.name.lower() in TEXT_COLUMNS


def _holds_images(type_: Any) -> bool:
    return _is_struct_of_bytes(type_) or _is_binary(type_)


def _is_struct_of_bytes(type_: Any) -> bool:
    """Hugging Face's Image: a struct of `bytes` and `path`."""
    is_struct = library("pyarrow").types.is_struct(type_)
    return is_struct and any(field.name == "bytes" and _is_binary(field.type) for field in type_)


def _is_binary(type_: Any) -> bool:
    types = library("pyarrow").types
    return types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)


def _holds_texts(type_: Any) -> bool:
    """Texts, or lists of them."""
    types = library("pyarrow").types
    if types.is_list(type_) or types.is_large_list(type_) or types.is_dictionary(type_):
        type_ = type_.value_type
    return types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)


# ---------------------------------------------------------------------------------------------------------------------
# rows


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str
    """`cats.parquet row 17`; rows count from 0, as in every program that shows such tables."""
    image: Any
    """A file's bytes, or a mapping with them under `bytes`."""
    text: Any = None


def write_rows(
    rows: Iterable[Row], columns: Columns, folder: Path, written: str, total: int, progress: Progress
) -> None:
    """One image file a row, named by its number, and their captions in a `metadata.jsonl`.

    Args:
        total: how many rows there are; 0 if that is not known.

    Raises:
        DataError: with every row whose image or caption cannot be used.
    """
    problems: list[Problem] = []
    number, size = -1, 0
    with (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as metadata:
        for number, row in enumerate(rows):
            progress(number, total)
            if number == MOST_ENTRIES or size > MOST_BYTES:
                what = f"is beyond {MOST_ENTRIES:,} rows or {MOST_BYTES >> 30} GiB of images, and no more is unpacked"
                problems.append(Problem(row.where, what, "Give a table of fewer rows."))
                break
            image, text = _image_of(row, columns), _text_of(row, columns)
            wrong = [found for found in (image, text) if isinstance(found, Problem)]
            problems += wrong
            if len(problems) >= ENOUGH:
                problems.append(Problem(row.where, "is the last that was looked at", "Mend these first."))
                break
            if not problems and isinstance(image, bytes):
                name = f"{number:06d}{suffix_of(image)}"
                (folder / name).write_bytes(image)
                size += len(image)
                metadata.write(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n")
    progress(number + 1, number + 1)
    if number < 0:
        problems.append(Problem(written, "holds no rows", "Give a table with images."))
    if problems:
        raise DataError.of(problems)
    if columns.text is None:
        (folder / "metadata.jsonl").unlink()


def _image_of(row: Row, columns: Columns) -> bytes | Problem:
    """The file's bytes, which are an image of a kind that is read."""
    fix = "Mend or remove the row."
    if isinstance(row.image, UnusableCell):
        return Problem(row.where, f"its {columns.image!r} {row.image.why}", fix)
    data = row.image.get("bytes") if isinstance(row.image, Mapping) else row.image
    if not data:
        path = row.image.get("path") if isinstance(row.image, Mapping) else None
        what = f"is only a path, {path!r}, without the image" if path else "is missing"
        return Problem(row.where, f"its {columns.image!r} {what}", fix)
    if not suffix_of(data):
        return Problem(row.where, f"its {columns.image!r} is no image of a kind that is read", fix)
    return data


def _text_of(row: Row, columns: Columns) -> str | list[str] | Problem | None:
    """The caption, or several; which may be empty, but not missing."""
    if columns.text is None or isinstance(row.text, str):
        return row.text
    if isinstance(row.text, list) and row.text and all(isinstance(text, str) for text in row.text):
        return row.text
    why = row.text.why if isinstance(row.text, UnusableCell) else "is missing" if not row.text else "holds no text"
    return Problem(row.where, f"its {columns.text!r} {why}", "Mend or remove the row.")


@dataclass(frozen=True)
class UnusableCell:
    """What stands in a row where a cell cannot be read."""

    why: str


def suffix_of(data: bytes) -> str:
    """The suffix that a file with these bytes should have; empty if it is none of the images that are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes and broken EXIF data; whoever reads the pixels will tell
        try:
            with Image.open(io.BytesIO(data), formats=_formats_here()) as image:
                return SUFFIXES.get(image.format or "", "")
        except DECODING_ERRORS:
            return ""


@lru_cache
def _formats_here() -> tuple[str, ...]:
    """Older versions of Pillow, and some builds of it, do without AVIF or WebP."""
    Image.init()
    return tuple(name for name in SUFFIXES if name in Image.OPEN)


# ---------------------------------------------------------------------------------------------------------------------
# parquet


@dataclass(frozen=True)
class Parquet:
    """One table in one or more parquet files, and what the person who named it wrote."""

    files: Sequence[Path]
    written: str
    asked: Mapping[str, str]

    def identity(self) -> list[Any]:
        columns = {key: self.asked[key] for key in ("image", "text") if key in self.asked}
        return ["parquet", columns, [sha256_of(file) for file in self.files]]

    def write(self, folder: Path, progress: Progress) -> None:
        """Write its images and captions into an empty folder.

        Raises:
            DataError: if a file is damaged, the columns cannot be told, or rows cannot be used.
        """
        library("pyarrow", self.written)
        heads = [_head(file) for file in self.files]
        schemas = [_schema(file) for file in self.files]
        columns = choose_columns(schemas[0], self.asked, self.written)
        self._check_alike(schemas, columns)
        rows = (row for file in self.files for row in _rows(file, columns))
        write_rows(rows, columns, folder, self.written, sum(head.num_rows for head in heads), progress)

    def _check_alike(self, schemas: Sequence[Any], columns: Columns) -> None:
        problems: list[Problem] = []
        for file, schema in zip(self.files, schemas, strict=True):
            try:
                choose_columns(schema, {"image": columns.image, "text": columns.text or ""}, str(file))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError.of(problems)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder that holds tables and no images; none if it holds an image."""
    found: list[Path] = []
    for file in folder.rglob("*"):
        if file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file, folder):
            return []
        if file.suffix.lower() == ".parquet" and not _is_hidden(file, folder):
            found.append(file)
    return sorted(found)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def shards_of(files: Sequence[Path], folder: Path, split: str | None, written: str) -> list[Path]:
    """The files of one table: those whose names differ in their number only, as `data/train-00000-of-00002.parquet`.

    Raises:
        DataError: if there are several tables, such as train and test, and none was named; or if a file is missing.
    """
    tables: dict[str, list[Path]] = {}
    for file in files:
        name = file.relative_to(folder).with_suffix("")
        tables.setdefault((name.parent / _SHARD.sub("", name.name)).as_posix(), []).append(file)
    named = [table for table in tables if split is None or split in (table, table.rpartition("/")[2])]
    if len(named) != 1:
        what = f"holds {len(tables)} tables" if split is None else f"holds {len(named) or 'no'} tables {split!r}"
        fix = f"Put ?split=NAME after the path; here are: {', '.join(tables)}."
        raise DataError(what, written, fix)
    shards = tables[named[0]]
    numbers = [_SHARD.search(file.stem) for file in shards]
    expected = {int(number["of"]) for number in numbers if number and number["of"]}
    if expected and expected != {len(shards)}:
        what = f"is one of {max(expected)} files of a table, of which {len(shards)} are here"
        raise DataError(what, str(shards[0]), "Download the others, or name the single file.")
    return shards


def _head(file: Path) -> Any:
    """A parquet file's metadata."""
    with _damage_named(file):
        return library("pyarrow.parquet").read_metadata(file)


def _schema(file: Path) -> Any:
    """Its columns."""
    with _damage_named(file):
        return library("pyarrow.parquet").read_schema(file)


def _rows(file: Path, columns: Columns) -> Iterator[Row]:
    """The rows of one file, a few in memory at a time."""
    number = 0
    with _damage_named(file), library("pyarrow.parquet").ParquetFile(file, memory_map=True) as table:
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns.names):
            for index in range(batch.num_rows):
                cells = [_cell(batch.column(name)[index]) for name in columns.names]
                yield Row(f"{file} row {number}", *cells)
                number += 1


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return UnusableCell(f"is not UTF-8 text ({error.reason} at byte {error.start})")


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (library("pyarrow").ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        what = f"cannot be read as parquet ({first_line(error)})"
        raise DataError(what, str(file), "Download or copy it again.") from error

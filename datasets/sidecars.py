"""Captions that lie beside images, by image; what would be ignored becomes a problem.

Read are `<image>.txt`, `<image>.caption` and `<image>.json`, and Hugging Face's `metadata.jsonl` and `metadata.csv`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..trainer.errors import Problem
from ..trainer.jsonfile import parse_json
from .captions import tidy
from .machine import Entry, read_record, wrote

Lines = Literal["join", "variants"]
"""What the lines of a caption file are: one caption together, or a caption each."""

SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
UNREAD_SIDECARS = (".tags", ".cap", ".captions")
METADATA = ("metadata.jsonl", "metadata.csv")
UNREAD_METADATA = ("metadata.parquet", "captions.json", "meta_cap.json", "meta_clean.json", "meta_lat.json")
"""Tables of captions that other programs write for a whole folder."""
LONGEST_CAPTION = 10_000
"""Characters: more than a hundred sentences. A text encoder reads some 300 at a time, and each piece takes memory in
every step."""
LARGEST_SIDECAR = 2**20
"""Bytes; a caption of the greatest length in a dozen variants, or all that sites tell of a picture in JSON."""
LARGEST_TABLE = 64 * 2**20
"""Bytes; hundred thousand captions of some sentences."""
_HALF_A_LETTER = re.compile("[\ud800-\udfff]")
"""JSON can write one of the two codes that are a letter together."""
_CAPTION_KEYS = ("caption", "text", "captions", "prompt")
_ABOUT_THE_FOLDER = {"readme", "license", "licence", "notice", "copying", "attribution", "credits", "requirements"}


@dataclass(frozen=True)
class Caption:
    """What was found for one image."""

    texts: tuple[str, ...]
    """At least one; several are variants, of which each showing takes one."""
    source: str
    """`cat.txt`, or `metadata.jsonl line 3`."""
    machine: bool = False
    """Whether a machine wrote it, and nobody has changed it since."""


class Sidecars:
    """Finds the captions of `images` among the files of their folders; problems are added to the given list."""

    def __init__(self, images: Iterable[Path], lines: Lines, problems: list[Problem]) -> None:
        self.lines: Lines = lines
        self.problems = problems
        self.found: dict[Path, Caption] = {}
        self.by_path: dict[str, Path] = {}
        self.by_stem: dict[Path, list[Path]] = {}
        self.records: dict[Path, dict[str, Entry]] = {}
        for image in images:
            self.by_path[os.path.normpath(image)] = image
            self.by_stem.setdefault(image.with_suffix(""), []).append(image)

    def read(self, files: list[Path]) -> dict[Path, Caption]:
        """The captions that metadata and sidecars hold."""
        for file in files:
            if file.name in METADATA:
                self._read_metadata(file)
        for file in files:
            suffix, owners = file.suffix.lower(), self._owners(file)
            if suffix in SIDECAR_SUFFIXES and owners:
                self._read_sidecar(file, owners)
            elif suffix in SIDECAR_SUFFIXES[:2] and file.stem.lower() not in _ABOUT_THE_FOLDER:
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
            elif file.name in UNREAD_METADATA:
                self._problem(
                    file,
                    "looks like captions, but tables of this kind are not read here",
                    f"Write them to {METADATA[0]}, or to a .txt file beside each image; then remove it.",
                )
        return self.found

    def _owners(self, sidecar: Path) -> list[Path]:
        """The image whose whole name stands before the sidecar's suffix, as in `a.png.txt`; or all of its stem."""
        name = sidecar.with_suffix("")
        exact = self.by_path.get(os.path.normpath(name))
        return [exact] if exact else self.by_stem.get(name, [])

    # -- beside each image --------------------------------------------------------------------------------------------

    def _read_sidecar(self, file: Path, owners: list[Path]) -> None:
        text = self._text(file, LARGEST_SIDECAR)
        texts = None if text is None else self._texts_of_json(file, text) if file.suffix.lower() == ".json" else text
        if texts is None:
            return
        if isinstance(texts, str):
            texts = self._texts_of_lines(texts)
        machine = len(texts) == 1 and wrote(self._record(file.parent), file.name, texts[0])
        for image in owners:
            self._add(file, image, Caption(texts, file.name, machine))

    def _texts_of_lines(self, text: str) -> tuple[str, ...]:
        if self.lines == "join":
            return (tidy(text),)
        return tuple(tidy(line) for line in text.splitlines() if line.strip()) or ("",)

    def _texts_of_json(self, file: Path, text: str) -> tuple[str, ...] | None:
        """A text, a list of texts, or an object with a caption or tags under one of the names that are usual."""
        try:
            value = parse_json(text)
        except ValueError as error:
            self._problem(file, f"is not JSON ({error})", "Mend or remove it.")
            return None
        try:
            return _texts_of(value)
        except ValueError as error:
            self._problem(file, str(error), f'Give it the form {{"{_CAPTION_KEYS[0]}": "the caption"}}, or remove it.')
        return None

    def _record(self, folder: Path) -> dict[str, Entry]:
        if folder not in self.records:
            try:
                self.records[folder] = read_record(folder)
            except OSError as error:
                self.records[folder] = {}
                self.problems.append(cannot_be_read(Path(error.filename or folder), error))
        return self.records[folder]

    # -- for a whole folder -------------------------------------------------------------------------------------------

    def _read_metadata(self, file: Path) -> None:
        text = self._text(file, LARGEST_TABLE)
        if text is not None:
            rows = self._rows_of_csv(file, text) if file.suffix == ".csv" else self._rows_of_jsonl(file, text)
            for number, row in rows:
                self._read_row(file, number, row)

    def _rows_of_jsonl(self, file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, Mapping) and isinstance(row.get("file_name"), str):
                yield number, row
            else:
                self._problem(_line(file, number), "is not a JSON object with a file_name", "Mend or remove the line.")

    def _rows_of_csv(self, file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            columns = reader.fieldnames or []
            if "file_name" not in columns or not {"text", "caption"} & set(columns):
                what = f"has no columns file_name and text (it has {', '.join(columns) or 'none'})"
                self._problem(file, what, "Name them so in its first line.")
                return
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            self._problem(file, f"is not CSV ({error})", "Mend it; quotes stand in pairs.")

    def _read_row(self, file: Path, number: int, row: Mapping[str, Any]) -> None:
        where, name = _line(file, number), row["file_name"]
        image = self.by_path.get(os.path.normpath(file.parent / name)) if name and "\0" not in name else None
        if image is None:
            self._problem(where, f"names {name!r}, which is no image here", "Mend or remove the line.")
            return
        try:
            texts = _texts_of(row.get("text", row.get("caption")))
        except ValueError:
            self._problem(where, 'has no "text"', 'Add "text": "the caption".')
            return
        if image in self.found:
            self._problem(where, f"is a second caption for {name}", "Keep one of the two.")
        elif self._is_usable(where, texts):
            self.found[image] = Caption(texts, f"{file.name} line {number}")

    # -- details ------------------------------------------------------------------------------------------------------

    def _add(self, file: Path, image: Path, caption: Caption) -> None:
        if image in self.found:
            self._problem(
                file,
                f"{image.name} has a caption in {self.found[image].source} already",
                "Keep one of the two; the other would be ignored.",
            )
        elif self._is_usable(file, caption.texts):
            self.found[image] = caption

    def _is_usable(self, where: Path | str, texts: tuple[str, ...]) -> bool:
        """Whether all are text, and none is longer than may be; else it is a problem."""
        longest = max(map(len, texts))
        if longest > LONGEST_CAPTION:
            what = f"holds a caption of {longest:,} characters; {LONGEST_CAPTION:,} is the most"
            self._problem(where, what, "Shorten it: say what is seen in some sentences.")
            return False
        if half := _HALF_A_LETTER.search("".join(texts)):
            self._problem(where, f"holds {half[0]!r}, half a letter, which is no text", "Write the caption anew.")
            return False
        return True

    def _text(self, file: Path, most: int) -> str | None:
        """What a text file of so many bytes at most holds; None, with a problem, if it cannot be read."""
        try:
            if (size := file.stat().st_size) > most:
                self._problem(file, f"has {size:,} bytes; {most:,} is the most for captions", "Split or shorten it.")
                return None
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self._problem(file, f"is not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8.")
        except OSError as error:
            self.problems.append(cannot_be_read(file, error))
        return None

    def _problem(self, where: Path | str, what: str, fix: str) -> None:
        self.problems.append(Problem(str(where), what, fix))


def cannot_be_read(file: Path, error: OSError) -> Problem:
    return Problem(str(file), f"cannot be read ({error.strerror})", "Change its permissions or remove it.")


def _texts_of(value: Any) -> tuple[str, ...]:
    """Caption variants of a JSON value.

    Raises:
        ValueError: if it holds none.
    """
    if isinstance(value, str):
        return (tidy(value),)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(tidy(text) for text in value)
    if isinstance(value, Mapping):
        for key in _CAPTION_KEYS:
            if key in value:
                return _texts_of(value[key])
        tags = value.get("tags")
        if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
            return (", ".join(tidy(tag) for tag in tags),)
        if isinstance(tags, str):
            return (tidy(tags),)
        raise ValueError(f"holds no caption (its keys are {', '.join(map(str, value)) or 'none'})")
    raise ValueError("holds no caption")


def _line(file: Path, number: int) -> str:
    return f"{file} line {number}"

"""Which captions a machine wrote: `machine-captions.jsonl` beside them, one JSON object a line, only ever appended to.

A caption is the machine's as long as its text is; a person who changes a word of it has made it theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..trainer.jsonfile import parse_json
from .captions import tidy

RECORD = "machine-captions.jsonl"


@dataclass(frozen=True)
class Entry:
    """One caption that a model wrote."""

    file: str
    """The caption file's name, without its folder: the record moves along with the folder."""
    sha256: str
    """Of the caption as it is read, so that an editor's line break at the end is no edit."""
    model: str
    """As it was named, e.g. a Hub id."""
    kind: str
    """blip, florence2 or wd-tagger."""
    settings: str = ""
    """How the model was asked; the same model with the same settings writes the same again."""


def entry_of(file_name: str, text: str, model: str, kind: str, settings: str = "") -> Entry:
    """What to record of a caption that a model has written."""
    return Entry(file_name, _sha256_of_text(text), model, kind, settings)


def read_record(folder: Path) -> dict[str, Entry]:
    """The record of one folder, by the caption file's name; the newest line of each file counts.

    Torn lines, and lines of other programs, are passed over: what is in doubt is a person's.

    Raises:
        OSError: if there is a record that cannot be read.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    entries = [entry for line in text.split("\n") if (entry := _entry(line))]
    return {entry.file: entry for entry in entries}


def wrote(record: Mapping[str, Entry], file_name: str, text: str) -> bool:
    """Whether a caption file holds what a machine wrote, and nobody has edited it since."""
    entry = record.get(file_name)
    return entry is not None and entry.sha256 == _sha256_of_text(text)


def append(folder: Path, entry: Entry) -> None:
    """Add a line, on the disk before anything that follows it happens; a line that a crash tore is ended first."""
    line = json.dumps(asdict(entry), ensure_ascii=True) + "\n"
    with (folder / RECORD).open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(("\n" if torn else "").encode() + line.encode())
        file.flush()
        os.fsync(file.fileno())


def _entry(line: str) -> Entry | None:
    try:
        values = parse_json(line)
        further = (values.get(name, "") for name in ("model", "kind", "settings"))
        entry = Entry(values["file"], values["sha256"], *further)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if all(isinstance(value, str) for value in asdict(entry).values()) else None


def _sha256_of_text(text: str) -> str:
    return hashlib.sha256(tidy(text).encode("utf-8", errors="surrogatepass")).hexdigest()

"""What was done to a folder, so that it can be undone: `.lorasmith-undo.json`, written before anything is changed.

Each deed holds the bytes that its files had. Undoing puts them back, except where a file was changed since: those are
named, and stay as they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..trainer.errors import DataError, Problem
from ..trainer.files import make_folder, rename, write_text
from ..trainer.jsonfile import parse_json
from .editing import Change, alone, bytes_of, put

JOURNAL = ".lorasmith-undo.json"
REMOVED = ".removed"
"""The folder, below the images', that holds what was removed from them; hidden, so that training does not see it."""
KEPT = 20
"""Deeds that can be undone, the last first."""


@dataclass(frozen=True)
class Move:
    """A file that got another place."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Deed:
    """Something that was done to several files at once."""

    what: str
    """As in `removed cat.png`."""
    changes: list[Change] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changes or self.moves)


@dataclass(frozen=True)
class Undone:
    """What undoing came to."""

    what: str
    restored: int
    """Files that are as they were."""
    left: list[Problem]
    """Files that were changed since, and stay."""


def carry_out(folder: Path, deed: Deed) -> None:
    """Record a deed, then do it.

    Raises:
        DataError: if one of its files is no longer what it was, or the folder cannot be written; then nothing is done.
        OSError: if a file cannot be written.
    """
    with alone(folder):
        if changed := [change.file for change in deed.changes if bytes_of(change.file) != change.before]:
            raise DataError.of(
                Problem(str(file), "was changed meanwhile, so that nothing was done", "Do it again.")
                for file in changed
            )
        _write(folder, [*_read(folder), _record(folder, deed)][-KEPT:])
        for change in deed.changes:
            put(change.file, change.after)
        for move in deed.moves:
            _move(move.source, move.target)


def last_deed(folder: Path) -> str:
    """What would be undone next; empty if there is nothing."""
    deeds = _read(folder)
    return str(deeds[-1]["what"]) if deeds else ""


def undo(folder: Path) -> Undone:
    """Put back what the last deed changed.

    Raises:
        DataError: if there is nothing to undo, or the folder cannot be written.
        OSError: if a file cannot be written.
    """
    with alone(folder):
        deeds = _read(folder)
        if not deeds:
            raise DataError("there is nothing to undo", str(folder), "Only changes of several images are kept for it.")
        deed, restored, left = deeds[-1], 0, []
        for row in reversed(deed["moves"]):
            source, target = folder / row["source"], folder / row["target"]
            if source.exists() == target.exists():
                what = "has its old place taken" if source.exists() else "is no longer where it was put"
                left.append(Problem(row["source"], what, f"See {row['target']}."))
                continue
            if not source.exists():  # else the deed had not come so far
                _move(target, source)
            restored += 1
        for row in deed["changes"]:
            file, before = folder / row["file"], _decoded(row["before"])
            now = bytes_of(file)
            if now != before and _hash(now) != row["after"]:
                left.append(Problem(row["file"], "was changed since", "It stays as it is now."))
                continue
            if now != before:
                put(file, before)
            restored += 1
        _write(folder, deeds[:-1])
        return Undone(str(deed["what"]), restored, left)


def _move(source: Path, target: Path) -> None:
    make_folder(target.parent)
    rename(source.replace, target)


# ---------------------------------------------------------------------------------------------------------------------
# on disk


def _record(folder: Path, deed: Deed) -> dict[str, Any]:
    return {
        "what": deed.what,
        "changes": [
            {"file": _below(folder, c.file), "before": _encoded(c.before), "after": _hash(c.after)}
            for c in deed.changes
        ],
        "moves": [{"source": _below(folder, m.source), "target": _below(folder, m.target)} for m in deed.moves],
    }


def _read(folder: Path) -> list[dict[str, Any]]:
    """The deeds, oldest first.

    Raises:
        DataError: if the journal was damaged, or names a file outside of its folder.
    """
    try:
        deeds = parse_json((folder / JOURNAL).read_text(encoding="utf-8"))["deeds"]
        _ = [(deed["what"], [(_decoded(row["before"]), row["after"]) for row in deed["changes"]]) for deed in deeds]
        names = [row[key] for deed in deeds for key in ("source", "target") for row in deed["moves"]]
        names += [row["file"] for deed in deeds for row in deed["changes"]]
        if not all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names):
            raise ValueError("it names files outside of the folder")
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        what = f"cannot be used to undo anything ({error})"
        raise DataError(what, str(folder / JOURNAL), "Remove this file; then changes can be undone again.") from error
    return deeds


def _write(folder: Path, deeds: Sequence[dict[str, Any]]) -> None:
    write_text(folder / JOURNAL, json.dumps({"version": 1, "deeds": list(deeds)}, ensure_ascii=False) + "\n")


def _below(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _hash(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _encoded(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode("ascii")


def _decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)

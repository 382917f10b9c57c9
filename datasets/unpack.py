"""Data that is no folder of images becomes one, once, in the cache: `as_folder`.

What `data.path` may be:

    photos/                                    a folder of images, used where it is
    photos.zip                                 an archive of such a folder
    table.parquet?image=img&text=caption       a table with a column of images, and one of captions
    tables/?split=train                        a folder of such tables and no images
    hf:owner/name?split=train&config=...&revision=...     a dataset of the Hugging Face Hub
    hf:folder                                  the same in a folder here

What stands after `?` is written as in a web address (%20 is a blank, %26 an &) and can be left out where only one
answer is possible; `?text=` asks for no captions. A folder in the cache is named by a hash of its content, so the same
content is unpacked once, wherever it lies, and an edited file is another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, urlencode

from ..trainer.errors import DataError, Problem
from ..trainer.files import atomic_folder, locked, make_folder, remove_leftovers, write_text
from ..trainer.jsonfile import read_json
from .archives import Archive
from .hub import COMMIT, HubDataset
from .tables import Parquet, parquet_files, shards_of
from .workers import Progress

CODE_VERSION = 1
"""Raise it when the same content would be unpacked otherwise."""
HUB = "hf:"
_SEAL = ".unpacked.json"
"""Written last, of how many files and bytes there are: caches are cleaned by people and programs that take a part."""
_ACCEPTED = "Set data.path to a folder of images, a .zip or .parquet file, or hf:owner/name for a dataset of the Hub."
_UNREAD_ARCHIVES = {".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"}


def as_folder(path: str, cache: Path, progress: Progress | None = None) -> Path:
    """The folder of images that a `data.path` stands for: the folder itself, or what was unpacked into the cache.

    Args:
        path: as in the list above.
        progress: called with (done, total) entries or rows; total is 0 as long as it is not known.

    Raises:
        DataError: with everything for which it cannot be unpacked; then nothing is left in the cache.
    """
    address = Address.of(path)
    try:
        source = _source(address, cache.absolute() / "unpacked")
        if source is None:
            return address.local.absolute()
        return _unpacked(source, path, cache.absolute() / "unpacked", progress or (lambda _done, _total: None))
    except OSError as error:
        what = f"cannot be unpacked ({error.strerror or error}: {error.filename or cache})"
        raise DataError(what, path, "Look at the room and the permissions there.") from error


def display_name(path: str) -> str:
    """What a person calls it: `photos.zip` for `/home/me/photos.zip`, and `hf:owner/name?split=train` as it is, only
    without a commit."""
    address = Address.of(path)
    if address.is_hub and not address.local.is_dir():
        asked = dict(address.asked)
        if COMMIT.fullmatch(asked.get("revision", "")):
            return _hub_path(address.place, {key: asked[key] for key in asked if key != "revision"})
        return path
    return (HUB if address.is_hub else "") + address.local.absolute().name


def anchored(path: str, start: Path) -> str:
    """The same data, told from anywhere: what is a relative path counts from `start`; a name on the Hub stays."""
    prefix, place = (HUB, path.removeprefix(HUB)) if path.startswith(HUB) else ("", path)
    there = str((start.absolute() / Path(place).expanduser()).resolve())
    return path if prefix and not Address.of(prefix + there).local.is_dir() else prefix + there


def local_folder(path: str) -> Path | None:
    """The folder here that images or tables are read from; None for files, names on the Hub, and what cannot be read,
    which `as_folder` tells of."""
    with suppress(DataError, OSError):
        folder = Address.of(path).local
        return folder.resolve() if folder.is_dir() else None
    return None


def pinned(path: str, cache: Path) -> str:
    """A name on the Hub with the commit that `as_folder` has just read, `hf:owner/name?revision=...`, so that it means
    the same data for ever; anything else as it is."""
    address = Address.of(path)
    if not address.is_hub or address.local.is_dir():
        return path
    commit = HubDataset(address.place, path, address.asked, cache.absolute() / "unpacked").commit_before
    if not commit:
        return path
    return _hub_path(address.place, {**address.asked, "revision": commit})


def _hub_path(place: str, asked: Mapping[str, str]) -> str:
    return f"{HUB}{place}?{urlencode(asked, quote_via=quote)}" if asked else HUB + place


# ---------------------------------------------------------------------------------------------------------------------
# addresses


@dataclass(frozen=True)
class Address:
    """A `data.path` in its parts."""

    written: str
    place: str
    """A path, or `owner/name`."""
    is_hub: bool
    asked: Mapping[str, str]
    """What stands after the question mark."""

    @classmethod
    def of(cls, path: str) -> Address:
        """Take a path apart.

        Raises:
            DataError: if what stands after the question mark cannot be read.
        """
        is_hub, place = path.startswith(HUB), path.removeprefix(HUB)
        if "?" not in place or _exists(place):  # a file may have a question mark in its name
            return cls(path, place, is_hub, {})
        place, _, query = place.rpartition("?")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        except ValueError as error:
            raise DataError(f"has {query!r} after its ?", path, "Write it as in ?image=COLUMN&text=COLUMN.") from error
        asked = dict(pairs)
        empty = [key for key, value in asked.items() if not value and key != "text"]
        several = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        problems = [Problem(path, f"has an empty {key}=", f"Write {key}=NAME.") for key in empty]
        problems += [Problem(path, f"has {key}= more than once", "Keep one.") for key in several]
        if problems:
            raise DataError.of(problems)
        return cls(path, place, is_hub, asked)

    @property
    def local(self) -> Path:
        return Path(self.place).expanduser()

    def with_place(self, place: str) -> str:
        """As it is written, with another place and the same prefix and questions."""
        prefix = HUB if self.is_hub else ""
        return prefix + place + self.written.removeprefix(prefix + self.place)

    def allow(self, *keys: str) -> None:
        """Refuse what would have no effect.

        Raises:
            DataError: for each key after the question mark that is none of these.
        """
        listed = f"Known here are {', '.join(keys)}." if keys else "Remove it."
        wrong = [key for key in self.asked if key not in keys]
        if wrong:
            raise DataError.of(Problem(self.written, f"has {key}=, which has no effect here", listed) for key in wrong)


def _exists(place: str) -> bool:
    with suppress(OSError, ValueError):  # by names that are too long, or hold a NUL
        return Path(place).expanduser().exists()
    return False


# ---------------------------------------------------------------------------------------------------------------------
# sources


class _Source(Protocol):
    """Something that can be written as a folder of images."""

    def identity(self) -> list[Any]:
        """What decides what is written, as JSON: hashes of bytes, and what was asked for."""
        ...

    def write(self, folder: Path, progress: Progress) -> None:
        """Fill an empty folder."""
        ...


def _source(address: Address, cache: Path) -> _Source | None:
    """What is to be unpacked; None for a folder that is used where it is."""
    path, written, asked = address.local, address.written, address.asked
    if address.is_hub:
        source = HubDataset(address.place, written, asked, cache)
        address.allow("config", "split", "image", "text", *([] if source.folder else ["revision"]))
        return source
    if path.is_dir():
        tables = parquet_files(path)
        address.allow(*(("split", "image", "text") if tables else ()))
        return Parquet(shards_of(tables, path, asked.get("split"), written), written, asked) if tables else None
    if not path.is_file():
        on_hub = f" On the Hub it may be: {HUB}{written}." if re.fullmatch(r"[\w.-]+/[\w.-]+", written) else ""
        raise DataError("there is no such folder or file", written, _ACCEPTED + on_hub)
    if path.suffix.lower() == ".zip":
        address.allow()
        return Archive(path, written)
    if path.suffix.lower() == ".parquet":
        address.allow("image", "text")
        return Parquet([path], written, asked)
    if path.suffix.lower() in _UNREAD_ARCHIVES:
        raise DataError(f"is a {path.suffix} archive, which is not read here", written, "Unpack it to a folder.")
    raise DataError("is a file, and of no kind that is unpacked here", written, _ACCEPTED)


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def _unpacked(source: _Source, written: str, cache: Path, progress: Progress) -> Path:
    """The folder in the cache with what the source holds; written if it is not there, or not whole."""
    identity = source.identity()
    folder = cache / hashlib.sha256(json.dumps([CODE_VERSION, *identity]).encode()).hexdigest()[:32]
    make_folder(cache)
    remove_leftovers(cache)
    with locked(cache / f"{folder.name}.lock"):
        if _is_whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with atomic_folder(folder, replace=False) as temporary:
                source.write(temporary, progress)
                if source.identity() != identity:
                    raise DataError("has changed while it was unpacked", written, "Start again.")
                write_text(temporary / _SEAL, json.dumps({"from": written, **_counted(temporary)}) + "\n")
        except OSError:
            if not _is_whole(folder):  # else another process was sooner, on a disk without locks
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        sealed = read_json(folder / _SEAL)
        return {key: sealed[key] for key in ("files", "bytes")} == _counted(folder)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _counted(folder: Path) -> dict[str, int]:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != _SEAL]
    return {"files": len(sizes), "bytes": sum(sizes)}

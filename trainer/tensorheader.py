"""The header of a `.safetensors` file, read without its tensors; and of a file that has none, what it is instead.

Eight bytes, little-endian, say how long the header is. The header is JSON in UTF-8, a name to `dtype`, `shape` and
`data_offsets` of each tensor, and in `__metadata__` text to text. The tensors follow without a gap, so a file's size is
known beforehand (https://github.com/huggingface/safetensors#format). The safetensors library says of a bad file only
that it is bad; here every kind of damage has a sentence of its own, and nothing but the header is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError, first_line
from .jsonfile import parse_json

LONGEST = 16 * 2**20
"""Bytes of a header; the longest that are known, with the tags of a hundred thousand images, have a quarter of it. The
library reads six times as many, of which Python would make more than a gigabyte."""
MOST_TENSORS = 50_000
"""A whole SDXL with its averages has 5,000, a LyCORIS of it 8,000."""
LONGEST_NAME = 1000
"""Characters of a tensor's name; the longest that are known have 130. Each is held against many patterns."""
_MOST = 1 << 60  # numbers in a tensor; beyond it, even an empty one has no place in memory
_LENGTH = 8  # bytes of the number that says how long it is
_BEGINNING = 512  # bytes, by which other kinds of files are known
_SHOWN = 100  # letters of a name that come from a file
_AGAIN = "Download or copy it again."
_NAME_ONE = "Name a .safetensors file."
_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8},
}
"""Bytes of a number, by safetensors' name of its type; no torch is needed to read a header."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, in bytes after the header."""

    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors and of itself."""

    entries: dict[str, Entry]
    """By name, in the order of names."""
    metadata: dict[str, str]


class _Damage(Exception):  # noqa: N818 (it never leaves this file)
    """Holds what is wrong with a file, and what to do about it."""


def read_header(path: Path) -> Header:
    """Read the header, and hold it against the file's size.

    Raises:
        UserError: naming the one thing that is wrong first.
    """
    if not path.is_file():
        raise UserError("is a folder" if path.is_dir() else "no such file", str(path), _NAME_ONE)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_BEGINNING)
            length = int.from_bytes(start[:_LENGTH], "little")
            _require_header(size, start, length)
            file.seek(_LENGTH)
            header = _parse(file.read(length))
        _require_whole(header.entries, size - _LENGTH - length)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", str(path), "Check its permissions.") from error
    except _Damage as damage:
        what, fix = damage.args
        raise UserError(what, str(path), fix) from None
    return header


def shown(text: str) -> str:
    """Text from a file as a part of one line, and not longer than is good to read."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _refuse(what: str, fix: str = _AGAIN) -> NoReturn:
    raise _Damage(what, fix)


# ---------------------------------------------------------------------------------------------------------------------
# what it is, if it is no safetensors file


def _require_header(size: int, start: bytes, length: int) -> None:
    """The first bytes must say how long a header is that can be there."""
    begins = start[_LENGTH : _LENGTH + 1] == b"{"
    if begins and length <= min(LONGEST, size - _LENGTH):
        return
    if not size:
        _refuse("is empty")
    if kind := _other_kind(start):
        _refuse(f"is no safetensors file: it is {kind[0]}", kind[1])
    if size < _LENGTH:
        _refuse(f"is not a whole safetensors file: it has {size} bytes, too few even for a header")
    if not start.strip(b"\0"):
        _refuse("holds zeros where its header should be, as a download does that broke off")
    if length > LONGEST:
        most = f"{_bytes(LONGEST)} is the most that is read"
        _refuse(f"is damaged: it says that its header has {_bytes(length)}, and {most}")
    if length > size - _LENGTH:
        missing = length - (size - _LENGTH)
        _refuse(f"is not a whole safetensors file: it ends {_bytes(missing)} before the end of its header")
    _refuse("is no safetensors file: where its header should begin, there is something else", _NAME_ONE)


_CONVERT = "Use a .safetensors file of it, or have somebody you trust convert it; a pickle may run code."
_UNPACK = "Unpack it, and name the .safetensors file in it."
_PAGE = "Open its address in a browser, log in if it asks for that, and download the file again."
_KINDS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a pointer of git-lfs, which stands for the file", "Run git lfs pull."),
    ((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body"), "a web page, perhaps to log in", _PAGE),
    ((b"{", b"["), "a text in JSON, such as a server's answer", _PAGE),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"rar!"), "an archive", _UNPACK),
    ((b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff"), "a picture", "Name the file that the picture stands beside."),
    ((b"gguf",), "a GGUF file", _NAME_ONE),
    (tuple(bytes((0x80, protocol)) for protocol in range(2, 6)), "a pickle (.ckpt, .pt) under another name", _CONVERT),
)
"""First bytes, in lower case and after white space; what they are; what to do."""


def _other_kind(start: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do; None if they tell nothing."""
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(start)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginnings, kind, fix in _KINDS:
        if text.startswith(beginnings):
            return kind, fix
    letters = start.decode("utf-8", "ignore")
    is_text = len(letters) > _LENGTH and all(letter.isprintable() or letter.isspace() for letter in letters)
    return ("a text", _NAME_ONE) if is_text else None


def _kind_of_zip(start: bytes) -> tuple[str, str]:
    """PyTorch puts its pickles into zip archives, of which they are the first entry."""
    if b"/data.pkl" in start:
        return "a pickle (.ckpt, .pt) under another name", _CONVERT
    return "a zip archive", _UNPACK


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with a header


class _TwiceError(ValueError):
    """A name that stands twice in one object of JSON."""


def _parse(raw: bytes) -> Header:
    try:
        found = parse_json(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        _refuse(f"is damaged: its header is not UTF-8 from byte {error.start} on")
    except _TwiceError as error:
        _refuse(f"is damaged: its header holds {error} twice", "Make the file again.")
    except ValueError as error:
        _refuse(f"is damaged: its header is not JSON ({first_line(error)})")
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        odd = next((key for key, value in _items(metadata) if not isinstance(value, str)), "__metadata__")
        _refuse(f"is damaged: {shown(odd)} in its metadata is not text, and all of it must be", "Make the file again.")
    if len(found) > MOST_TENSORS:
        _refuse(f"holds {len(found):,} tensors, and {MOST_TENSORS:,} is the most that is read", _NAME_ONE)
    if long := next((key for key in found if len(key) > LONGEST_NAME), None):
        _refuse(f"is damaged: the name {shown(long)} has {len(long):,} characters", "Make the file again.")
    return Header({key: _entry(key, found[key]) for key in sorted(found)}, metadata)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(shown(Counter(name for name, _ in pairs).most_common(1)[0][0]))
    return found


def _items(metadata: Any) -> Iterator[tuple[str, Any]]:
    return iter(metadata.items() if isinstance(metadata, dict) else ())


def _entry(key: str, said: Any) -> Entry:
    """One tensor, whose bytes are as many as its shape and type need."""
    said = said if isinstance(said, dict) else {}
    dtype, shape, offsets = (said.get(name) for name in ("dtype", "shape", "data_offsets"))
    said_all = isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    if not said_all or math.prod(max(1, side) for side in shape) > _MOST:
        _refuse(f"is damaged: its header does not say type, shape and place of {shown(key)}")
    if dtype not in _SIZES:
        what = f"holds {shown(key)} of the type {shown(dtype)}, which clients of Stable Diffusion do not read"
        _refuse(what, "Use the fp16 file of it.")
    entry = Entry(dtype, tuple(shape), *offsets)
    needed, given = math.prod(shape) * _SIZES[dtype], entry.end - entry.start
    if needed != given:
        what = f"its header gives {_bytes(given)} to {shown(key)}, which by its shape and type has {_bytes(needed)}"
        _refuse(f"is damaged: {what}")
    return entry


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of numbers that count bytes or rows."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _require_whole(entries: dict[str, Entry], size: int) -> None:
    """Tensors must fill the file from the header to its end, one after the other."""
    at, before = 0, "the header"
    placed = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    for key, entry in placed:
        if entry.start < at:
            _refuse(f"is damaged: {before} and {shown(key)} are in the same place", "Make the file again.")
        if entry.start > at:
            what = f"is damaged: {_bytes(entry.start - at)} between {before} and {shown(key)} belong to no tensor"
            _refuse(what, "Make the file again.")
        at, before = entry.end, shown(key)
    if size < at:
        cut = [key for key, entry in placed if entry.end > size]
        what = f"is not a whole safetensors file: the last {_bytes(at - size)} of it are missing, and with them"
        _refuse(f"{what} {len(cut)} of its {len(placed)} tensors, from {shown(cut[0])} on")
    if size > at:
        _refuse(f"is damaged: it goes on for {_bytes(size - at)} after its last tensor")


def _bytes(number: int) -> str:
    return f"{number:,} bytes" if number != 1 else "1 byte"

"""A `.safetensors` file that is written tensor by tensor, so that memory holds one of them at a time.

The safetensors library writes what is in memory as a whole; an SDXL does not fit there next to another one. What is
added here goes to a file beside the target at once; at the end the parts are put in the library's own order (large
types first, then by name), behind a header that may name their hash. The result is what the library writes of
the same tensors, byte by byte, but for the order of words in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import UserError
from .files import atomic_file

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""safetensors' names, in its order: files begin with the last of them."""
_ORDER = list(DTYPE_NAMES)
_BLOCK = 1 << 22  # bytes that are copied at a time


@dataclass(frozen=True)
class _Part:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    """Where its bytes lie in the spooled file."""


class TensorWriter:
    """Takes tensors one after the other, and writes the file when it knows its header; made by `tensor_writer`."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._parts: dict[str, _Part] = {}
        self._digest = ""  # of what is there; computed once, for a model is gigabytes

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, key: str, tensor: Tensor) -> None:
        """Put a tensor into the file. On any device, in any layout; its bytes are on disk when this returns.

        Raises:
            ValueError: for a key that is there already, or a type that safetensors has no name for.
        """
        if key in self._parts or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{key} of {tensor.dtype} cannot be added")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        start = self._spool.seek(0, 2)
        if flat.numel():
            content: Any = flat.view(torch.uint8).numpy()
            self._spool.write(content)
        self._parts[key] = _Part(tensor.dtype, tuple(tensor.shape), start, flat.numel() * flat.element_size())
        self._digest = ""

    @property
    def keys(self) -> list[str]:
        return list(self._parts)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(part.size for part in self._parts.values())

    def digest(self) -> str:
        """SHA-256 of the bytes after the header, lower-case hex: its first 12 digits are AutoV3."""
        if not self._digest:
            whole = hashlib.sha256()
            for block in self._blocks():
                whole.update(block)
            self._digest = whole.hexdigest()
        return self._digest

    def legacy_hash(self, metadata: Mapping[str, str]) -> str:
        """A1111's first hash, of 64 KiB from 1 MiB on, of the file that would have this header; 8 digits."""
        start, end, at = 0x100000, 0x110000, 0
        found = hashlib.sha256()
        for block in self._whole(metadata):
            found.update(block[max(0, start - at) : max(0, end - at)])
            if (at := at + len(block)) >= end:
                break
        return found.hexdigest()[:8]

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file, whole or not at all. More may be added afterwards, for another file.

        Raises:
            UserError: if its name does not end in .safetensors.
        """
        require_ending(path)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            for block in self._whole(metadata):
                file.write(block)

    def _whole(self, metadata: Mapping[str, str]) -> Iterator[bytes]:
        yield self._header(metadata)
        yield from self._blocks()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        at = 0
        for key, part in self._sorted():
            entries[key] = {
                "dtype": DTYPE_NAMES[part.dtype],
                "shape": part.shape,
                "data_offsets": [at, at := at + part.size],
            }
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _blocks(self) -> Iterator[bytes]:
        for _, part in self._sorted():
            self._spool.seek(part.start)
            left = part.size
            while left:
                block = self._spool.read(min(left, _BLOCK))
                left -= len(block)
                yield block

    def _sorted(self) -> list[tuple[str, _Part]]:
        return sorted(self._parts.items(), key=lambda entry: (-_ORDER.index(entry[1].dtype), entry[0]))


def require_ending(path: Path) -> None:
    """Clients look for files of one ending.

    Raises:
        UserError: if the file has another.
    """
    if path.suffix != ".safetensors":
        raise UserError("does not end in .safetensors", str(path), "Clients go by the ending: add it.")


@contextmanager
def tensor_writer(folder: Path) -> Iterator[TensorWriter]:
    """A writer whose tensors wait in a folder, on the disk that the file will lie on, until they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as spool:
        yield TensorWriter(spool)


Header = Callable[[TensorWriter], dict[str, str]]
"""What a file says about itself, when all its tensors are there."""

"""Files of weights as they are shared: `.safetensors`, and pickles such as `.ckpt`, of which no code is ever run."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import BaseModelError, UserError, first_line
from .tensorheader import read_header

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
ENDINGS = (".safetensors", *PICKLES)
_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class WeightFile:
    """What a file holds, by its keys; the weights themselves are read when they are asked for."""

    path: Path
    where: str
    """The setting that names the file, for errors."""
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    """Empty for a pickle."""

    @classmethod
    def open(cls, path: Path, where: str) -> WeightFile:
        """Read the header, without torch; a pickle has none, and torch maps it into memory.

        Raises:
            BaseModelError: if it is cut short, of another kind, or a pickle of anything but tensors.
        """
        if path.suffix in PICKLES:
            shapes = {key: tuple(tensor.shape) for key, tensor in _load_pickle(path, where).items()}
            return cls(path, where, shapes, {})
        if path.suffix != ".safetensors":
            raise BaseModelError(f"{path.name} is no file of weights", where, f"Known are {', '.join(ENDINGS)}.")
        try:
            header = read_header(path)
            with safe_open(path, framework="numpy"):
                return cls(path, where, {key: entry.shape for key, entry in header.entries.items()}, header.metadata)
        except UserError as error:
            (problem,) = error.problems
            raise BaseModelError(f"{path.name} {problem.what}", where, problem.fix) from None
        except SafetensorError as error:
            raise BaseModelError(f"{path.name} is not a whole safetensors file ({error})", where, _AGAIN) from error

    def refusal(self, what: str, fix: str) -> BaseModelError:
        """The error that this file is not what it should be."""
        return BaseModelError(f"{self.path.name} {what}", self.where, fix)

    def tensors(self) -> dict[str, Tensor]:
        """All weights on the CPU, mapped from the file: what is never touched is never read."""
        if self.path.suffix in PICKLES:
            return _load_pickle(self.path, self.where)
        from safetensors.torch import load_file

        return load_file(self.path)

    def spread(self, key: str) -> float | None:
        """The standard deviation of one tensor; None if there is none of this name, or of plain numbers."""
        if key not in self.shapes:
            return None
        if self.path.suffix in PICKLES:
            return float(_load_pickle(self.path, self.where)[key].float().std(unbiased=False))
        numbers = _numbers(self.path, key)
        return None if numbers is None or not numbers.size else float(numbers.std())


def _numbers(path: Path, key: str) -> np.ndarray | None:
    """One tensor, flat, in fp32; numpy knows no bf16, which is the upper half of fp32."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[key]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        content = file.read(end - start)
    if entry["dtype"] == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    plain = {"F16": "<f2", "F32": "<f4"}.get(entry["dtype"])
    return None if plain is None else np.frombuffer(content, plain).astype(np.float32)


def _load_pickle(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a pickle by their keys. torch builds tensors and plain containers only, and calls nothing else.

    Raises:
        BaseModelError: if the pickle names anything else, which loading it might run.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what torch cannot read, it raises
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {named[1]}, which is no weight and might run code" if named else "is no pickle of weights"
        raise BaseModelError(f"{path.name} {what}", where, _NO_PICKLE) from None
    except _BROKEN as error:
        raise BaseModelError(f"{path.name} cannot be read ({first_line(error)})", where, _AGAIN) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)  # pytorch-lightning keeps a model's weights there
    found = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in found if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise BaseModelError(f"{path.name} holds no weights", where, "Name the file of a model.")
    return tensors


_NO_PICKLE = "Download the .safetensors file of the model, or have somebody you trust convert it."
# What unpickling raises where bytes are missing or wrong.
_BROKEN = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile),
)

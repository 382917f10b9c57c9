"""A LoRA file on disk: its header, hashes and tensors, and the family of models that it is for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bases import FamilyName
from .delta import Form
from .errors import UserError, first_line
from .keys import LEAVES, Format, component_of, split_key
from .tensorheader import read_header

_DIFFUSERS_LEAVES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# Width of the text that cross-attention reads, in the published models.
_CROSS_ATTENTION: dict[int, FamilyName] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
FP8: tuple[str, ...] = ("F8_E4M3", "F8_E5M2")
_TEXT_WIDTH: dict[int, FamilyName] = {768: "sd1", 1024: "sd2"}


@dataclass(frozen=True)
class Hashes:
    """The names a file goes by, lower-case hex."""

    sha256: str
    """Of the whole file."""
    autov1: str
    """A1111's first hash: 64 KiB from 1 MiB on, 8 digits."""
    autov2: str
    """The first 10 digits of `sha256`."""
    autov3: str
    """The first 12 digits of the SHA-256 of the bytes after the header: what LoRA managers look for."""
    tensors: str
    """All 64 digits of it."""


@dataclass(frozen=True)
class LoraFile:
    """The header of a `.safetensors` file; tensors are read when they are asked for."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """safetensors' names: `F16`, `BF16`, `F32`, ..."""
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> LoraFile:
        """Read the header, and nothing else.

        Raises:
            UserError: if there is no such file, or it is not safetensors, or it is cut short or damaged; see
                `read_header`.
        """
        header = read_header(path)
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            what = f"is not read by the safetensors library ({first_line(error)})"
            raise UserError(what, str(path), "Download or copy it again.") from error
        shapes = {key: entry.shape for key, entry in header.entries.items()}
        dtypes = {key: entry.dtype for key, entry in header.entries.items()}
        return cls(path, shapes, dtypes, header.metadata)

    def tensors(self, suffix: str = "") -> dict[str, Tensor]:
        """The tensors whose key ends so, on the CPU."""
        return dict(self.read(key for key in self.shapes if key.endswith(suffix)))

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors one after the other, on the CPU; those of 8 bits as fp16, which holds each of their numbers,
        because PyTorch does not calculate with them."""
        with safe_open(self.path, framework="pt") as file:
            for key in keys:
                tensor = file.get_tensor(key)
                yield key, tensor.half() if self.dtypes[key] in FP8 else tensor

    def count(self, key: str) -> int:
        """How many numbers a tensor has."""
        return math.prod(self.shapes[key])

    @cached_property
    def format(self) -> Format | None:
        """Whose names the keys are; None if neither's, or a mixture."""
        known = bool(self.shapes) and all(component_of(key) for key in self.shapes)
        if known and all(key.startswith("lora_") and "." in key for key in self.shapes):
            return "kohya"
        return "diffusers" if known and all(key.endswith(_DIFFUSERS_LEAVES) for key in self.shapes) else None

    @property
    def is_kohya(self) -> bool:
        """Whether most of its keys begin as kohya's."""
        return 2 * sum(key.startswith("lora_") for key in self.shapes) > len(self.shapes)

    @cached_property
    def layers(self) -> dict[str, dict[str, str]]:
        """Name of a layer to its tensors, by kohya's leaves, to their keys; keys of unknown kinds are left out."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            if split := split_key(key):
                found.setdefault(split[0], {})[split[1]] = key
        return found

    @cached_property
    def hashes(self) -> Hashes:
        """Read once from end to end."""
        whole, after = hashlib.sha256(), hashlib.sha256()
        with self.path.open("rb") as file:
            head = file.read(8)
            head += file.read(int.from_bytes(head, "little"))
            whole.update(head)
            while block := file.read(1 << 20):
                whole.update(block)
                after.update(block)
            file.seek(0x100000)
            first = hashlib.sha256(file.read(0x10000)).hexdigest()
        digest, tensors = whole.hexdigest(), after.hexdigest()
        return Hashes(digest, first[:8], digest[:10], tensors[:12], tensors)


def fitting(patterns: Mapping[str, Any], path: str) -> Any:
    """What PEFT's configuration says of a layer: the value of the first pattern that fits the end of its path; None if
    none does.

    Patterns are regular expressions, and come from the file. One that could take for ever to be tried is refused: those
    that are written are a layer's name, or many of them as `^(?:one|another)$`.

    Raises:
        ValueError: if a pattern is not such a one.
    """
    for pattern, value in patterns.items():
        names = grouped[1] if (grouped := _GROUP.fullmatch(pattern)) else pattern
        if not _SIMPLE.fullmatch(names) or len(_REPEATS.findall(names)) > _MOST_REPEATS:
            raise ValueError(f"{pattern!r} is no name of a layer")
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return None


_GROUP = re.compile(r"\^?\(\?:([^()]*)\)\$?")
_SIMPLE = re.compile(r"(?:[\w.^$|-]|\\[.d-]|(?<=[.d])[*+])*")
_REPEATS = re.compile(r"[*+]")
_MOST_REPEATS = 2  # each more multiplies how long it takes by the length of the path


def guess_family(file: LoraFile) -> tuple[FamilyName | None, str]:
    """The family a LoRA was made for, and what tells it: a second text encoder, then widths, then names, then what the
    file says."""
    components = {component_of(key) for key in file.shapes}
    if "text_encoder_2" in components:
        return "sdxl", "it names two text encoders"
    for name, keys in file.layers.items():
        width = _inputs({leaf: file.shapes[key] for leaf, key in keys.items()})
        if name.endswith(("attn2_to_k", "attn2.to_k")) and width in _CROSS_ATTENTION:
            return _CROSS_ATTENTION[width], f"its cross-attention reads text of width {width}"
        is_text_width = name.endswith(("self_attn_q_proj", "self_attn.q_proj")) and width in _TEXT_WIDTH
        if is_text_width and not name.startswith("lora_te1_"):
            return _TEXT_WIDTH[width], f"its text encoder has width {width}"
    if any(key.startswith(("lora_unet_input_blocks", "lora_unet_output_blocks")) for key in file.shapes):
        return "sdxl", "its UNet has sgm names"
    if any(key.startswith("lora_te1_") for key in file.shapes):
        return "sdxl", "it names the first of two text encoders"
    said = family_said(file.metadata)
    return said, "its metadata says so" if said else "neither names, widths nor metadata tell"


def _inputs(shapes: dict[str, tuple[int, ...]]) -> int:
    """How wide the vectors are that an adapted linear layer reads; 0 if its tensors do not tell."""
    widths = {leaf: shape[1] for leaf, shape in shapes.items() if len(shape) > 1}
    for leaf in ("lora_down.weight", "hada_w1_b", "diff"):
        if leaf in widths:
            return widths[leaf]
    factors = [widths.get(f"lokr_w{number}", widths.get(f"lokr_w{number}_b", 0)) for number in (1, 2)]
    return factors[0] * factors[1]


def family_said(metadata: Mapping[str, str]) -> FamilyName | None:
    """The family that kohya's and ModelSpec's keys name."""
    version = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    if "sdxl" in version or "stable-diffusion-xl" in version:
        return "sdxl"
    if metadata.get("ss_v2") == "True" or "sd_v2" in version or "stable-diffusion-v2" in version:
        return "sd2"
    return "sd1" if "sd_v1" in version or "stable-diffusion-v1" in version else None


def form_of(leaves: Iterable[str]) -> Form | None:
    """As `Delta.form`, told by the names of a layer's tensors; None of an alpha alone."""
    there = set(leaves)
    if "dora_scale" in there:
        return "dora"
    return next((form for form, known in LEAVES.items() if there & set(known)), None)


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """As `Delta.rank`, told by the shapes of a layer's tensors."""
    for leaf in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if shapes.get(leaf):
            return shapes[leaf][0]
    return 0

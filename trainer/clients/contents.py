"""What is in a LoRA file, without its large tensors, and what it means: the layers it changes, each at its scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..jsonfile import parse_json
from ..lorafile import LoraFile, fitting

ALPHA = "alpha"
_READABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8"}
_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
# Leaves beside those that `LoraFile.layers` knows, by which LyCORIS and kohya's OFT change a layer.
_OTHERS = re.compile(r"(?P<name>.+)\.(?:[ab][12]\.weight|diff_b|[wb]_norm|oft_(?:blocks|diag)|rescale|on_input)")


@dataclass(frozen=True)
class Meant:
    """The change of one layer that a file holds."""

    keys: frozenset[str]
    """Of its tensors, without alpha."""
    scale: float | None
    """What they are multiplied with; None where it is not known, of kinds that this project does not read."""


@dataclass(frozen=True)
class Contents:
    """The header of a file and its alphas."""

    file: LoraFile
    alphas: Mapping[str, float]
    """By key; NaN for one that is not a single number."""

    @classmethod
    def of(cls, file: LoraFile) -> Contents:
        single = [
            key
            for key, shape in file.shapes.items()
            if is_alpha(key) and math.prod(shape) == 1 and file.dtypes[key] in _READABLE
        ]
        read = {key: float(tensor) for key, tensor in file.read(single)}
        return cls(file, {key: read.get(key, math.nan) for key in file.shapes if is_alpha(key)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.file.shapes

    def is_single(self, alpha: str) -> bool:
        """Whether an alpha is one number; Python's `.item()`, by which clients read it, raises for any other."""
        return math.prod(self.shapes[alpha]) == 1

    @cached_property
    def said(self) -> dict[str, Any] | None:
        """What diffusers wrote into the header of PEFT's configuration; None if that cannot be read."""
        try:
            said = parse_json(self.file.metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    @cached_property
    def meant(self) -> dict[str, Meant]:
        """By the layer's name in the file, what it changes; what has an alpha only changes nothing."""
        found = {
            name: Meant(frozenset(key for leaf, key in leaves.items() if leaf != ALPHA), self._scale(name, leaves))
            for name, leaves in self.file.layers.items()
            if leaves.keys() - {ALPHA}
        }
        for key in self.shapes:
            if (other := _OTHERS.fullmatch(key)) and not key.startswith("bundle_emb."):
                before = found.get(other["name"], Meant(frozenset(), None))
                beside = {f"{other['name']}.weight"} & self.shapes.keys() if key.endswith(".on_input") else set()
                found[other["name"]] = Meant(before.keys | {key} | beside, before.scale)
        return found

    def scale_of(self, leaves: Mapping[str, str]) -> float:
        """alpha / rank, as all clients have it; 1 without an alpha, and for what has no rank (full, LoKr of two)."""
        rank = self.rank_of(leaves)
        return self.alphas[leaves[ALPHA]] / rank if rank and ALPHA in leaves else 1.0

    def rank_of(self, leaves: Mapping[str, str]) -> int:
        """0 where it has none."""
        shapes = (self.shapes[leaves[leaf]] for leaf in _RANKED if leaf in leaves)
        return next((shape[0] for shape in shapes if shape), 0)

    def _scale(self, name: str, leaves: Mapping[str, str]) -> float:
        component, _, path = name.partition(".")
        if ALPHA in leaves or not self.said or "lora_down.weight" not in leaves:
            return self.scale_of(leaves)
        return said_scale(self.said, component, path)


def is_alpha(key: str) -> bool:
    return key.rpartition(".")[2] == ALPHA


def said_scale(said: Mapping[str, Any], component: str, path: str) -> float:
    """The scale that PEFT's configuration in the header gives a layer; its defaults are rank 8 and alpha 8."""
    rank = said_number(said, component, path, "rank", "r")
    alpha = said_number(said, component, path, "alpha", "lora_alpha")
    return alpha / (math.sqrt(rank) if said.get(f"{component}.use_rslora") else rank) if rank > 0 else math.nan


def said_number(said: Mapping[str, Any], component: str, path: str, what: str, name: str) -> float:
    """A rank or an alpha: that of the first pattern which fits the end of the path, as PEFT looks it up."""
    patterns = said.get(f"{component}.{what}_pattern")
    try:
        own = fitting(patterns, path) if isinstance(patterns, dict) else None
        return float(said.get(f"{component}.{name}", 8) if own is None else own)
    except (TypeError, ValueError, OverflowError):
        return math.nan

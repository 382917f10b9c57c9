"""One thing that is wrong with a LoRA file, or good to know of it; and what the checks of such files look at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from ..bases import FamilyName
from ..delta import Delta, Form
from ..keys import ALPHA, component_of
from ..lorafile import LoraFile, form_of, guess_family, rank_of
from ..loraread import COMPLETE, places
from ..tensorheader import shown

if TYPE_CHECKING:
    from ..models import Base

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A kind of problem; however many keys have it, it is one finding."""

    severity: Severity
    """error: the file does not do what it should in any client, or breaks some. warning: some clients do something else
    with it. note: good to know."""
    where: str
    """A key, how many others have the same, a component, or a part of the metadata."""
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}. {self.fix}".rstrip()


def found(severity: Severity, names: Sequence[str], what: str, fix: str = "", noun: str = "keys") -> Iterator[Finding]:
    """One finding for all of them, and none if there are none."""
    if names:
        first = shown(names[0])
        where = first if len(names) == 1 else f"{len(names)} {noun}, such as {first}"
        yield Finding(severity, where, what, fix)


@dataclass(frozen=True)
class Layer:
    """An adapted layer, by what the header says of it."""

    name: str
    """As in the file, but for wrappers."""
    keys: Mapping[str, str]
    """By kohya's leaves."""
    shapes: Mapping[str, tuple[int, ...]]
    component: str
    """`unet`, `text_encoder`, `text_encoder_2` or `unknown`."""
    place: tuple[str, str] | None
    """Component and path in the base; None without a base, or if it has no such layer."""

    @property
    def form(self) -> Form | None:
        return form_of(self.keys)

    @property
    def rank(self) -> int:
        return rank_of(self.shapes)

    @property
    def missing(self) -> set[str]:
        """The tensors that it lacks for a change, of its alpha and those it has; empty if none."""
        there = set(self.keys) - {ALPHA}
        if any(needed <= there for needed in COMPLETE):
            return set()
        return min((needed - there for needed in COMPLETE if needed & there), key=len, default={"all but its alpha"})

    @property
    def has_product(self) -> bool:
        """Whether its down and up, if it has those, are matrices of one rank."""
        shapes = [self.shapes[leaf] for leaf in ("lora_down.weight", "lora_up.weight") if leaf in self.shapes]
        return all(len(shape) > 1 and math.prod(shape) for shape in shapes) and (
            len(shapes) < 2 or shapes[0][0] == shapes[1][1]
        )

    @property
    def is_convolution(self) -> bool:
        """Whether it is one of those of residual and sampling layers."""
        return bool(_CONVOLUTION.search(self.name))


_CONVOLUTION = re.compile(r"resnets|samplers|(?:in|out|emb)_layers[._]|skip_connection|_op$|conv")
_BARE = {
    "unet": re.compile(r"diffusion_model\..*|(?:(?:down|up|input|output)_blocks|mid_block|middle_block).*"),
    "text_encoder": re.compile(r"(?:text_model\.)?encoder\.layers\..*"),
}
"""Names that do not say their component."""


@dataclass(frozen=True)
class Case:
    """What the checks look at."""

    file: LoraFile
    base: Base | None = None
    """Shapes are enough."""

    @cached_property
    def guess(self) -> tuple[FamilyName | None, str]:
        """The family that the file was made for, and what tells it."""
        return guess_family(self.file)

    @property
    def family(self) -> FamilyName | None:
        """What the checks go by: that of the base, if there is one and the file is for it."""
        return self.base.info.family if self.base and not self.is_of_other_family else self.guess[0]

    @cached_property
    def layers(self) -> list[Layer]:
        by_name = places(self.base.components, self.base.info.family) if self.base else {}
        return [
            Layer(name, keys, {leaf: self.file.shapes[k] for leaf, k in keys.items()}, part_of(name), by_name.get(name))
            for name, keys in self.file.layers.items()
        ]

    @cached_property
    def alphas(self) -> dict[str, float]:
        """By the names of layers; of those that have one, and one number."""
        keys = {layer.keys[ALPHA]: layer.name for layer in self.layers if ALPHA in layer.keys}
        single = [key for key in keys if self.file.count(key) == 1]
        return {keys[key]: float(tensor) for key, tensor in self.file.read(single)}

    @cached_property
    def misfits(self) -> list[tuple[Layer, tuple[int, ...]]]:
        """Layers whose product is not of the shape of the base's weight, with that; nothing is read or computed."""
        found = []
        for layer in self.layers if self.base else ():
            if self.base and layer.place and layer.has_product and not layer.missing:
                component, path = layer.place
                shape = tuple(self.base.components[component].get_submodule(path).weight.shape)
                empty = {leaf: torch.empty(size, device="meta") for leaf, size in layer.shapes.items() if leaf != ALPHA}
                if not Delta(path, empty, 0.0).fits(shape):
                    found.append((layer, shape))
        return found

    @cached_property
    def is_of_other_family(self) -> bool:
        """Whether it was made for another family than that of the base, where its layers are not, or do not fit."""
        if not self.base or self.guess[0] in (None, self.base.info.family):
            return False
        return bool(self.misfits) or not all(layer.place for layer in self.layers)


def part_of(name: str) -> str:
    """The component of a layer's name."""
    told = component_of(name)
    return told or next((part for part, pattern in _BARE.items() if pattern.fullmatch(name)), "unknown")

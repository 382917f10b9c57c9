"""The LoRA files that a tool reads, of any trainer, with the shape of the base that all of them were made for.

Tensors are mapped into memory, so that several files of gigabytes take no more of it than the layer that is worked on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import skeleton
from ..architectures import PUBLISHED
from ..baking import fastest
from ..bases import FAMILY_TITLES, BaseInfo, FamilyName, inspect_base
from ..baseweights import BaseWeights
from ..delta import Changes, Delta
from ..errors import Problem, UserError
from ..lorafile import LoraFile, guess_family
from ..loraread import read_lora
from ..models import Base


@dataclass(frozen=True)
class Source:
    """One LoRA file."""

    file: LoraFile
    changes: dict[str, list[Delta]]
    """By component; tensors as in the file."""


@dataclass(frozen=True)
class Sources:
    """LoRA files that are read together."""

    base: Base
    """Shapes only."""
    named: bool
    """Whether the base was named; else it is the published one of the files' family, which they fit."""
    files: tuple[Source, ...]

    @property
    def info(self) -> BaseInfo:
        return self.base.info

    def shape(self, component: str, layer: str) -> torch.Size:
        """That of a layer's weight."""
        module: Any = self.base.components[component].get_submodule(layer)
        return module.weight.shape

    def weight(self, component: str, deltas: Sequence[Delta]) -> Tensor:
        """What `deltas` of one layer are changes of, where matrices are decomposed fastest: the base's own weight if
        one is a DoRA, else a tensor of its shape with any numbers in it."""
        layer = deltas[0].name
        if any(delta.form == "dora" for delta in deltas):
            return self._weights.weight(component, layer).to(fastest())
        return torch.empty(self.shape(component, layer), device=fastest())

    @cached_property
    def _weights(self) -> BaseWeights:
        return BaseWeights.open(self.info)

    def require_weights(self) -> None:
        """What depends on the base's own weights can be computed only where the base is named.

        Raises:
            UserError: for a DoRA without its base.
        """
        for source in () if self.named else self.files:
            if any(delta.form == "dora" for _, delta in layers(source.changes)):
                what = "is a DoRA, whose change depends on the base's own weights"
                raise UserError(what, str(source.file.path), "Name the base it was trained on with --base.")


def read_sources(paths: Sequence[Path], model: str = "") -> Sources:
    """Read the files on the base they were made for; without one, on the published model of their family.

    Raises:
        UserError: if the family cannot be told, the files are of different families, or one does not fit the base.
    """
    files = [LoraFile.open(path) for path in paths]
    family = _common_family(files)
    if not (model or family):
        what = f"is for a base that cannot be told: {guess_family(files[0])[1]}"
        raise UserError(what, str(paths[0]), "Name the base it was made for with --base.")
    info = inspect_base(model or PUBLISHED[family or "sd1"])
    base = skeleton(info)
    return Sources(base, bool(model), tuple(Source(file, _read(file, base, bool(model))) for file in files))


def layers(changes: Changes) -> Iterator[tuple[str, Delta]]:
    """(component, change) of all layers."""
    return ((component, delta) for component, own in changes.items() for delta in own)


def _common_family(files: Iterable[LoraFile]) -> FamilyName | None:
    """That of all files that tell one."""
    found: dict[FamilyName, tuple[LoraFile, str]] = {}
    for file in files:
        family, because = guess_family(file)
        if family:
            found.setdefault(family, (file, because))
    if len(found) > 1:
        told = [f"{file.path.name} is for {FAMILY_TITLES[f]}, for {because}" for f, (file, because) in found.items()]
        what = f"cannot be put together: {'; '.join(told)}"
        raise UserError(what, "LoRAs of different families", "Take files of one family.")
    return next(iter(found), None)


def _read(file: LoraFile, base: Base, named: bool) -> dict[str, list[Delta]]:
    try:
        return read_lora(file.path, base.components, base.info.family)
    except UserError as error:
        if named:
            raise
        what = f"not given, so the file was taken to be for a published {FAMILY_TITLES[base.info.family]}"
        assumed = Problem("--base", what, "If it is for a model of another shape, name that.")
        raise UserError.of([*error.problems, assumed]) from error

"""Files of every kind, written by the exporter, and what the live models answer that they were taken from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.trainer.adapter import deltas
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.clients.table import FORM_OF
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.delta import Delta, Form
from lorasmith.trainer.export import tensors, write
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.keys import Format
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.sharing.metadata import Facts

from .bases import ARCHITECTURE, FamilyName, Subject
from .runners.asking import answers

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter, and the formats it is written in."""

    settings: dict[str, Any]
    formats: tuple[Format, ...]
    spread: float = 0.05
    """Of what is added to all trained weights, so that they are not where they begin."""

    @property
    def form(self) -> Form:
        return FORM_OF[self.settings["kind"]]


KINDS: dict[str, Kind] = {
    "LoRA": Kind({"kind": "lora", "targets": "attention+ff"}, ("kohya", "diffusers")),
    "LoCon": Kind({"kind": "lora", "targets": "all"}, ("kohya", "diffusers")),
    "LoHa": Kind({"kind": "loha", "targets": "all"}, ("kohya",), spread=0.15),  # of four factors, so it is smaller
    "LoKr": Kind({"kind": "lokr", "targets": "all"}, ("kohya",)),
    "DoRA": Kind({"kind": "dora", "targets": "all"}, ("kohya",)),
    "DoRA of the UNet": Kind({"kind": "dora", "targets": "all", "text_encoder": False}, ("kohya", "diffusers")),
}
RANK, ALPHA = 4, 6.0  # alpha is not the rank, so that a client that takes it for that shows


@dataclass(frozen=True)
class Case:
    """One file, and what a client should answer with it."""

    family: FamilyName
    kind: str
    format: Format
    file: Path
    before: Answers
    """Of the base alone."""
    live: Answers
    """Of the model that the file was taken from."""

    @property
    def form(self) -> Form:
        return KINDS[self.kind].form


def make_cases(subject: Subject, folder: Path, kinds: Sequence[str]) -> Iterator[Case]:
    """Write all files of a subject anew; each kind comes with its formats."""
    given, plain = load_file(subject.given), load_base(inspect_base(str(subject.base)))
    before = answers(plain.unet, plain.text_encoders, given)
    for kind in kinds:
        base = copy.deepcopy(plain)
        adapt(base, kind)
        live = answers(base.unet, base.text_encoders, given)
        for format in KINDS[kind].formats:
            file = folder / f"{file_stem(subject.family, kind, format)}.safetensors"
            write(base, file, format, Facts(kind))
            yield Case(subject.family, kind, format, file, before, live)


def adapt(base: Base, kind: str) -> None:
    """Put an adapter on, none of whose weights is where it began."""
    put_on(base, AdapterSection(rank=RANK, alpha=ALPHA, **KINDS[kind].settings), seed=1)
    random = torch.Generator().manual_seed(2)
    for parameter in trained_weights(base).values():
        parameter.data.add_(KINDS[kind].spread * torch.randn(parameter.shape, generator=random))


def published_keys(family: FamilyName, kind: str) -> dict[Format, set[str]]:
    """The keys of files of this kind for the published model, of its shapes alone."""
    base, changes = _published(family, kind)
    return {format: set(tensors(base, changes, format)) for format in KINDS[kind].formats}


def write_published(family: FamilyName, kind: str, format: Format, file: Path) -> None:
    """A file of the same kind for the published model: its widths, rank 1, and random numbers."""
    base, changes = _published(family, kind)
    write(base, file, format, Facts(kind), changes={name: [*map(_filled, own)] for name, own in changes.items()})


def _published(family: FamilyName, kind: str) -> tuple[Base, dict[str, list[Delta]]]:
    """The published model with an adapter of rank 1, and what that changes; nothing but shapes."""
    base = skeleton(inspect_base(f"random:{ARCHITECTURE[family]}"))
    put_on(base, AdapterSection(rank=1, alpha=2.0, **KINDS[kind].settings), seed=1)
    changes = {name: list(deltas(module)) for name, module in base.components.items()}
    return base, {name: own for name, own in changes.items() if own}


def _filled(delta: Delta) -> Delta:
    return Delta(delta.name, {leaf: torch.rand(tensor.shape) for leaf, tensor in delta.tensors.items()}, delta.alpha)


def file_stem(family: FamilyName, kind: str, format: Format) -> str:
    return f"{family}-{kind.replace(' ', '-')}-{format}"

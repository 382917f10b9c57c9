"""LoRA files put into a base for good: the base with their changes in its weights, as a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...datasets.workers import Progress
from ..anatomy import skeleton
from ..bases import BaseInfo
from ..baseweights import Additions, refuse_target, rewrite
from ..errors import UserError
from ..export import Precision
from ..loraread import read_lora
from ..strengths import Strengths


@dataclass(frozen=True)
class IntoBase:
    """A model that was made of a base and LoRA files."""

    path: Path
    weights: int
    """How many of its weights the files change."""


def merge_into_base(
    base: BaseInfo,
    loras: Sequence[tuple[Path, Strengths]],
    target: Path,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> IntoBase:
    """Write the base with strength x change added to each weight, to a `.safetensors` file or a diffusers folder.

    Files of any trainer, each with its strengths; several are added one after the other, as clients do it. What they
    change is computed in fp32, and without a precision each weight keeps its type.

    Raises:
        UserError: if a file does not fit the base, a block of its strengths holds none of its layers, or the target is
            one of the files that are read.
        ExportError: if a weight is not finite afterwards, or was not written as it is.
    """
    if not loras:
        raise UserError("no LoRA file was given", "merge", "Name one at least.")
    refuse_target(target, [file for file, _ in loras])
    outline, added = skeleton(base), Additions()
    for file, strengths in loras:
        changes = read_lora(file, outline.components, base.family)
        names = [(component, delta.name) for component, own in changes.items() for delta in own]
        strengths.refuse_idle(names)
        strengths.refuse_nothing(names)
        added.add(changes, strengths)
    sources = [base.short_name, *(f"{file.stem} at {strengths}" for file, strengths in loras)]
    rewrite(base, target, added.to, precision, target.stem, progress, sources)
    return IntoBase(target, len(added))

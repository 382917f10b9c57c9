"""A plain LoRA of another rank, which every client reads, of a file of any kind and trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from ...datasets.workers import Progress
from ..baking import Losses
from ..delta import Delta, baked
from ..errors import UserError
from ..export import Precision
from ..keys import Format
from ..sharing.facts import BakedFacts
from ..tensorfile import TensorWriter
from .sources import Sources, layers, read_sources
from .writing import Written, header_of, lora_writer, require_names


def resize(
    source: Path,
    target: Path,
    rank: int = 0,
    energy: float = 0.0,
    base: str = "",
    format: Format = "kohya",
    precision: Precision = "fp16",
    progress: Progress | None = None,
) -> Written:
    """Write the nearest plain LoRA: of `rank` at most, or of each layer the least rank that keeps a share `energy` of
    its |change|^2. `Written.lost` says what is missing.

    `base` is the model that the file was made for. A DoRA needs its weights; for all others the published model of the
    family that the file is recognised as is taken if none is named.

    Raises:
        UserError: if not one of rank and energy is given, if the file cannot be read or is for a base that cannot be
            told, or if a DoRA's base is not named.
        ExportError: if what was written is not what was meant.
    """
    require_goal(rank, energy)
    sources = read_sources([source], base)
    (read,) = sources.files
    require_names(source, sources.base, read.changes)
    sources.require_weights()
    total = sum(len(own) for own in read.changes.values())
    losses = Losses()
    alphas = {name: alpha_for(sources, name, ([d] for d in own), rank) for name, own in read.changes.items()}
    with lora_writer(target, sources.base, format, alphas) as writer:
        for done, (component, delta) in enumerate(layers(read.changes), start=1):
            made = baked(delta, sources.weight(component, [delta]), rank, energy)
            losses.add(component, made)
            writer.add(component, made.delta, precision)
            if progress:
                progress(done, total)

        def header(tensors: TensorWriter) -> dict[str, str]:
            shape = writer.shape
            facts = BakedFacts(max(shape.ranks), losses.shares)
            return header_of(read.file.metadata, target, sources.info, shape, facts, tensors)

        return writer.finish(header, losses.shares)


def require_goal(rank: int, energy: float) -> None:
    """Exactly one of the two.

    Raises:
        UserError: if none or both are given, or one is out of its range.
    """
    if bool(rank) == bool(energy):
        raise UserError("give one of the two", "--rank, --energy", "A rank such as 32, or an energy such as 0.95.")
    if rank < 0:
        raise UserError(f"{rank} is no rank", "--rank", "Give a number from 1 on.")
    if not 0 <= energy <= 1:
        raise UserError(f"{energy:g} is no share", "--energy", "Give a number above 0, up to 1.")


def alpha_for(sources: Sources, component: str, parts: Iterable[list[Delta]], rank: int) -> float:
    """The alpha of a component whose layers, of each the changes that are put together, are brought to a rank: the rank
    that most of them will have, so that their scale is 1; where the energy decides about it, 1."""
    if not rank:
        return 1.0
    reached = Counter(min(rank, _most(deltas, sources.shape(component, deltas[0].name))) for deltas in parts)
    return float(reached.most_common(1)[0][0])


def _most(deltas: list[Delta], shape: torch.Size) -> int:
    """The largest rank that a sum of changes can have."""
    sides = min(shape[0], shape[1:].numel())
    return min(sides, sum(delta.rank if delta.form == "lora" else sides for delta in deltas))

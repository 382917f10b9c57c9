"""A LoRA out of two whole models: what fine-tuning changed in each layer, as its nearest product of low rank.

The best approximation of a matrix by one of rank r, in Frobenius norm, is its truncated SVD (Eckart & Young 1936). Of a
large matrix only the first parts are computed, from random projections (Halko, Martinsson & Tropp 2011,
https://arxiv.org/abs/0909.4061, algorithm 4.4).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...datasets.workers import Progress
from ..bases import inspect_base
from ..baseweights import BaseWeights, open_alike, refuse_target, write_verified
from ..delta import Delta, baked, lora
from ..errors import ExportError, UserError
from ..export import DTYPES, Precision, castable, tensors
from ..keys import Format, base_name
from ..models import Base
from ..paths import path_of
from ..sharing.facts import Facts, last_part
from ..sharing.metadata import Shape, as_text, build
from ..tensorfile import TensorWriter, require_ending, tensor_writer

_OVERSAMPLED = 16  # more parts than are kept, so that those are exact
_ROUNDS = 4  # of power iteration: fine-tuning's singular values fall slowly
_WORTH_PROJECTING = 256  # rows or columns; below, the whole SVD is as quick


@dataclass(frozen=True)
class Extracted:
    """A LoRA file that was made of two models."""

    path: Path
    ranks: dict[str, list[int]]
    """By component, those of the layers in the file."""
    unchanged: dict[str, int]
    """By component, how many layers are the same in both models, and so not in the file."""
    lost: dict[str, float]
    """By component, the share of its layers' change that the file lacks: |change - what is in the file| / |change|."""
    beyond: dict[str, dict[str, float]]
    """By component and kind of weights, the share of the component's change that no LoRA holds: |theirs| / |all|."""
    told: tuple[str, ...]
    """What a person should know, in sentences."""


@dataclass
class _Tally:
    """What was found in one component; sums of squares."""

    ranks: list[int] = field(default_factory=list)
    unchanged: int = 0
    changed: float = 0.0
    rest: float = 0.0
    beyond: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By kind of weights."""
    convolutions: bool = False

    @property
    def lost(self) -> float:
        return math.sqrt(self.rest / self.changed) if self.changed else 0.0

    @property
    def shares(self) -> dict[str, float]:
        whole = self.changed + sum(self.beyond.values())
        return {kind: math.sqrt(square / whole) for kind, square in self.beyond.items()}


def extract(
    tuned: str,
    original: str,
    target: Path,
    rank: int = 0,
    energy: float = 0.0,
    conv_rank: int = 0,
    format: Format = "kohya",
    precision: Precision = "fp16",
    device: str = "auto",
    progress: Progress | None = None,
) -> Extracted:
    """Write tuned - original of all layers that clients know as a plain LoRA.

    Each layer is of `rank`, convolutions larger than 1x1 of `conv_rank` if that is given; or of the least rank that
    keeps a share `energy` of its squared Frobenius norm. Alpha is `rank`, or 1 where ranks differ by energy: the same
    in all layers, for some clients read one only. A layer is left out if it is the same in both models in the
    precision of the tuned one. Memory holds one layer at a time.

    Raises:
        UserError: if neither or both of rank and energy are given, the models are not of one family and shape, hold
            NaN, or are the same, or the target is one of them.
        ExportError: if a change cannot be held in the precision, or was not written as it is.
    """
    _refuse_sizes(rank, energy, conv_rank)
    require_ending(target)
    new_info, old_info = inspect_base(tuned), inspect_base(original)
    refuse_target(target, [new_info.source, old_info.source])
    new, old = open_alike(new_info, old_info)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    alpha, base = float(rank or 1), old.outline
    layers = _layers(base, format)
    tallies = {component: _Tally() for component in old.names()}
    names = [(component, name) for component, own in old.names().items() for name in own]
    with tensor_writer(target.parent) as writer:
        for done, (component, name) in enumerate(names, start=1):
            tally, layer = tallies[component], layers.get(path_of(component, name))
            change = _change(new, old, component, name)
            if change is None:
                tally.unchanged += layer is not None
            elif layer is None:
                tally.beyond[_kind_of(component, name)] += _square(change)
            else:
                is_convolution = change[0, 0].numel() > 1
                size = conv_rank if conv_rank and is_convolution else rank
                made = nearest(layer, change.to(where), size, energy)
                folded = lora(layer, made.down, made.up * (made.rank / alpha), alpha)
                written = castable(base, {component: [folded]}, format, DTYPES[precision])
                for key, tensor in tensors(base, written, format).items():
                    writer.add(key, tensor)
                tally.ranks.append(made.rank)
                tally.convolutions |= is_convolution
                tally.changed += _square(change)
                tally.rest += _square(change.double() - written[component][0].of(change, torch.float64))
            if progress:
                progress(done, len(names))
        if not len(writer):
            what = "no layer that a LoRA can change differs between them"
            fix = "Name a fine-tuned model, and the one that it was made from."
            raise UserError(what, f"{new_info.short_name} and {old_info.short_name}", fix)
        write_verified(writer, target, _header(writer, target.stem, new, old, tallies, alpha, format))
    shown = {component: tally for component, tally in tallies.items() if tally.changed or tally.beyond}
    return Extracted(
        path=target,
        ranks={component: tally.ranks for component, tally in shown.items() if tally.ranks},
        unchanged={component: tallies[component].unchanged for component in base.components},
        lost={component: tally.lost for component, tally in shown.items() if tally.ranks},
        beyond={component: tally.shares for component, tally in shown.items() if tally.beyond},
        told=tuple(_told(new, old, shown)),
    )


def nearest(name: str, change: Tensor, rank: int = 0, energy: float = 0.0) -> Delta:
    """The plain LoRA, of scale 1 and in fp32, that is nearest to a change, (out, in) or (out, in, kh, kw): of a rank,
    or of the least one that keeps a share of its squared norm."""
    matrix = change.flatten(1)
    if energy or min(matrix.shape) < max(_WORTH_PROJECTING, 4 * (rank + _OVERSAMPLED)):
        return baked(Delta(name, {"diff": change}, 0.0), change, rank, energy).delta
    with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
        torch.manual_seed(0)  # the same file each time
        u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLED, niter=_ROUNDS)
    root, kernel = s[:rank].sqrt(), change.shape[1:]
    up, down = u[:, :rank] * root, root[:, None] * v[:, :rank].T
    return lora(name, down.reshape(rank, *kernel), up.reshape(*up.shape, *(1 for _ in kernel[1:])), float(rank))


# ---------------------------------------------------------------------------------------------------------------------
# what differs


def _refuse_sizes(rank: int, energy: float, conv_rank: int) -> None:
    if bool(rank) == bool(energy):
        what = "both are given" if rank else "neither is given"
        raise UserError(what, "rank and energy", "Give a rank, such as 32, or an energy to keep, such as 0.9.")
    if rank < 0 or not 0 <= energy <= 1 or conv_rank < 0:
        what = f"rank {rank}, conv_rank {conv_rank} or energy {energy:g} is out of bounds"
        raise UserError(what, "rank and energy", "Ranks are from 1 on, energy lies above 0, at most 1.")
    if conv_rank and energy:
        raise UserError("has no effect beside an energy", "conv_rank", "Leave it out, or give a rank.")


def _layers(base: Base, format: Format) -> dict[str, str]:
    """The layers that all clients know, by the path of their weight as people write it."""
    name_of = partial(base_name, base.info.family, layers_per_block=int(base.unet.config["layers_per_block"]))
    found = {}
    for component, module in base.components.items():
        for layer, own in module.named_modules():
            if isinstance(own, nn.Linear | nn.Conv2d):
                try:
                    name_of(component, layer, format=format)
                except ExportError:  # outside of the blocks
                    continue
                found[path_of(component, f"{layer}.weight")] = layer
    return found


def _change(new: BaseWeights, old: BaseWeights, component: str, name: str) -> Tensor | None:
    """What was changed in a parameter, fp32; None if nothing was, as far as the tuned model's precision tells."""
    tuned, original = new.tensor(component, name), old.tensor(component, name)
    if torch.equal(original.to(tuned.dtype), tuned):
        return None
    change = tuned.float() - original.float()
    if not change.isfinite().all():
        name_of_model = (old if not original.float().isfinite().all() else new).info.short_name
        raise UserError(f"{component}.{name} holds NaN or infinity", name_of_model, "Take another copy of the model.")
    return change


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


_KINDS = {
    r".*embeddings\..*": "embeddings of tokens",
    r"(?:.*\.)?\w*norm\d?\.(?:weight|bias)": "norms",
    r".*\.bias": "biases",
    r".*": "layers outside of the blocks",
}
"""Patterns of parameters that no LoRA holds, the first of which counts."""


def _kind_of(component: str, name: str) -> str:
    if component == "vae":
        return "the VAE"
    return next(kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, name))


# ---------------------------------------------------------------------------------------------------------------------
# what is said of it


def _header(
    writer: TensorWriter,
    name: str,
    new: BaseWeights,
    old: BaseWeights,
    tallies: dict[str, _Tally],
    alpha: float,
    format: Format,
) -> dict[str, str]:
    """As of any LoRA of ours. Whose license the tuned model is under, is not known."""
    ranks = [rank for tally in tallies.values() for rank in tally.ranks]
    alphas = [alpha] * len(ranks) if format == "kohya" else [float(rank) for rank in ranks]
    reach = any(tally.convolutions for tally in tallies.values())
    header = build(Facts(name), old.info, Shape(tuple(ranks), tuple(alphas), reach), writer)
    header.pop("modelspec.license", None)
    lost = {component: round(tally.lost, 6) for component, tally in tallies.items() if tally.ranks}
    source = last_part(new.info.model)
    return header | as_text({"lorasmith_extracted_from": source, "lorasmith_extracted_lost": lost})


def _told(new: BaseWeights, old: BaseWeights, tallies: dict[str, _Tally]) -> list[str]:
    told = []
    for component, tally in tallies.items():
        for kind, share in tally.shares.items():
            of_all = "" if component == "vae" else f" ({share:.1%} of the change of {component})"
            told.append(f"{kind[0].upper()}{kind[1:]} changed too{of_all}: no LoRA holds that, so the file lacks it.")
    if new.info.prediction != old.info.prediction:
        told.append(
            f"{new.info.short_name} predicts {new.info.prediction} and {old.info.short_name} {old.info.prediction}: "
            "with the file, the original predicts what the tuned one does, and a client has to be told."
        )
    types = [{weights.dtype(c, n) for c, own in weights.names().items() for n in own} for weights in (new, old)]
    if types[0] != types[1]:
        told.append("The models are of different precisions: what rounding changed counts as change.")
    return told

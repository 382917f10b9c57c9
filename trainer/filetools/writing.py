"""The one way in which a tool writes a LoRA: layer by layer, each held against what was meant, and the file whole or
not at all.

What is written is what every client reads: names of the one grammar, one alpha for all layers of a component (in
diffusers' format none: it is a part of `lora_B`, and the header remembers it), finite numbers, and a header that says
for which models the file is, and its hashes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bases import BaseInfo, FamilyName
from ..delta import Changes, Delta, Form, joined
from ..errors import ExportError, Problem, UserError
from ..export import DTYPES, Precision, cast, common_alpha, layer_tensors
from ..files import until_verified
from ..keys import Format, base_name, grammar
from ..lorafile import Hashes, LoraFile
from ..models import Base
from ..sharing.facts import BakedFacts
from ..sharing.metadata import Shape, rewritten
from ..tensorfile import TensorWriter, require_ending, tensor_writer
from ..verify import NEGLIGIBLE, WEIGHT_TOLERANCE, is_still, plain_difference, plain_size
from .sources import layers

ALPHAS = "lorasmith_alphas"
"""In the header of a file in diffusers' format: the alpha of each component that became a part of `lora_B`."""
_SHOWN = 3  # layers that an error names
_NAMED = 8  # layers that it says how to leave out


@dataclass(frozen=True)
class Written:
    """A LoRA file that a tool made."""

    path: Path
    format: Format
    precision: Precision
    """Of most layers."""
    bytes: int
    layers: dict[str, int]
    """How many of each component change."""
    ranks: tuple[int, ...]
    """All there are, from the least on."""
    lost: dict[str, float]
    """|change - what is kept| / |change| of each component, where it was brought to another rank."""
    hashes: Hashes


class LoraWriter:
    """Takes the changes of one layer after the other, and keeps none; made by `lora_writer`."""

    def __init__(
        self, tensors: TensorWriter, target: Path, base: Base, format: Format, alphas: Mapping[str, float]
    ) -> None:
        self._tensors, self._target, self._base, self._alphas = tensors, target, base, alphas
        self._format: Format = format
        self._grammar = grammar(base.info.family, format)
        self._checks: dict[str, list[_Check]] = {}
        self._precisions: Counter[Precision] = Counter()
        self._ranked: list[tuple[int, float]] = []
        self._forms: Counter[Form] = Counter()
        self._convolutions = self._acts = False

    def add(self, component: str, delta: Delta, precision: Precision) -> None:
        """Put one layer into the file; its bytes are on disk when this returns.

        Raises:
            UserError: if its numbers are beyond the range of the precision.
            ExportError: if it has no name that all clients know.
        """
        layer: Any = self._base.components[component].get_submodule(delta.name)
        meant = _shaped(delta, layer.weight.shape, self._format)
        alpha = self._alphas[component] if self._format == "kohya" else float(meant.rank)
        written = cast(meant, alpha, DTYPES[precision])
        where = f"{component}.{delta.name}"
        if not all(tensor.isfinite().all() for tensor in written.tensors.values()):
            raise UserError(f"is beyond the range of {precision}", where, "Take another --precision: bf16 or fp32.")
        for key, tensor in layer_tensors(self._base, component, written, self._format).items():
            self._tensors.add(key, tensor)
        self._checks.setdefault(component, []).append(_check(where, meant, written, layer.weight.shape, precision))
        self._precisions[precision] += 1
        self._forms[written.form] += 1
        self._ranked += [(written.rank, written.alpha)] if written.rank else []
        self._convolutions |= layer.weight[0, 0].numel() > 1
        self._acts |= not is_still(written)

    @property
    def shape(self) -> Shape:
        """What a header says of all layers that were added."""
        ranks, alphas = tuple(rank for rank, _ in self._ranked), tuple(alpha for _, alpha in self._ranked)
        return Shape(ranks, alphas, self._convolutions, self._forms.most_common(1)[0][0])

    def finish(self, header: Callable[[TensorWriter], dict[str, str]], lost: Mapping[str, float]) -> Written:
        """Write the file with the header that `header` makes, read it again, and only then give it its name.

        Raises:
            UserError: if nothing was added that changes anything.
            ExportError: if a layer is not what was meant, or the file on disk not what was written.
        """
        if not self._acts:
            what = "would change nothing: there is no layer in it whose change is not zero"
            raise UserError(what, str(self._target), "Take files that were trained, and strengths other than 0.")
        self._require_near()
        folded = {ALPHAS: json.dumps(dict(self._alphas))} if self._format == "diffusers" else {}
        with until_verified(self._target) as unverified:
            self._tensors.write(unverified, header(self._tensors) | folded)
            hashes = self._read_back(unverified)
        return Written(
            path=self._target,
            format=self._format,
            precision=self._precisions.most_common(1)[0][0],
            bytes=self._target.stat().st_size,
            layers={component: len(checks) for component, checks in self._checks.items()},
            ranks=tuple(sorted({rank for rank, _ in self._ranked})),
            lost=dict(lost),
            hashes=hashes,
        )

    def _require_near(self) -> None:
        """Every layer must be what was meant; one that hardly changes is held against the largest of its component."""
        far = []
        for checks in self._checks.values():
            largest = max(check.size for check in checks)
            for check in checks:
                error = check.difference / (max(check.size, NEGLIGIBLE * largest) or 1.0)
                if not error <= check.allowed:
                    what = f"its change is off by {error:.2%} (allowed {check.allowed:.2%})"
                    far.append(Problem(check.where, what, "Take another --precision: fp32."))
        if far:
            raise ExportError.of(far[:_SHOWN])

    def _read_back(self, path: Path) -> Hashes:
        file = LoraFile.open(path)
        odd = sorted(key for key in file.shapes if not self._grammar.fullmatch(key))
        if odd or file.shapes.keys() != set(self._tensors.keys):
            what = f"holds {odd[0]}, which clients do not read" if odd else "does not hold what was written"
            raise ExportError(what, self._target.name, "Report it, with the file it was made of.")
        if file.metadata["sshs_model_hash"] != file.hashes.tensors:
            raise ExportError("is not what was written", self._target.name, "Write it again, to another disk.")
        return file.hashes


@contextmanager
def lora_writer(target: Path, base: Base, format: Format, alphas: Mapping[str, float]) -> Iterator[LoraWriter]:
    """A writer of one file; of `base`, shapes are enough. `alphas`: what all LoRAs and DoRAs of a component get.

    Raises:
        UserError: if the file's name does not end in .safetensors.
    """
    require_ending(target)
    with tensor_writer(target.parent) as tensors:
        yield LoraWriter(tensors, target, base, format, alphas)


# ---------------------------------------------------------------------------------------------------------------------
# one layer


@dataclass(frozen=True)
class _Check:
    """How near a layer in the file is to what was meant, in Frobenius norms; not its numbers."""

    where: str
    size: float
    difference: float
    allowed: float
    """As a share of the size."""


def _check(where: str, meant: Delta, written: Delta, shape: torch.Size, precision: Precision) -> _Check:
    """Of a DoRA the product is compared, since its lengths are fp32 in any file."""
    one, other = _product(meant), _product(written)
    if _is_same(one, other):  # to compute the size of what is no product of two factors takes long
        size, difference = plain_size(one) if one.is_plain else 0.0, 0.0
    elif one.is_plain:
        size, difference = plain_size(one), plain_difference(one, other)
    else:
        anything = torch.empty(shape)
        change = one.of(anything, torch.float64)
        size, difference = float(change.norm()), float((other.of(anything, torch.float64) - change).norm())
    return _Check(where, size, difference, WEIGHT_TOLERANCE[DTYPES[precision]])


def _product(delta: Delta) -> Delta:
    return replace(delta, tensors={leaf: t for leaf, t in delta.tensors.items() if leaf != "dora_scale"})


def _is_same(one: Delta, other: Delta) -> bool:
    same = all(torch.equal(tensor.float(), other.tensors[leaf].float()) for leaf, tensor in one.tensors.items())
    return same and one.scale == other.scale


def _shaped(delta: Delta, shape: torch.Size, format: Format) -> Delta:
    """The same change with as many dimensions as the layer's weight has, as clients take them to be: those of some
    trainers have two for convolutions of 1 x 1, or four for linear layers. The core of a LoRA, which diffusers does not
    read, becomes a part of `down` there."""
    if format == "diffusers" and "lora_mid.weight" in delta.tensors and (made := joined([(delta, 1.0)])):
        delta = made
    tensors, ones = dict(delta.tensors), [1] * (len(shape) - 2)
    for leaf, tensor in delta.tensors.items():
        size = tensor.numel()
        if leaf == "dora_scale":
            tensors[leaf] = tensor.reshape([size, 1, *ones] if len(tensor) == shape[0] else [1, size, *ones])
        elif leaf == "diff":
            tensors[leaf] = tensor.reshape(shape)
        elif leaf == "lora_down.weight" and "lora_mid.weight" not in tensors:
            tensors[leaf] = tensor.reshape(len(tensor), *shape[1:])
        elif leaf == "lora_up.weight":
            tensors[leaf] = tensor.reshape(*tensor.shape[:2], *ones)
    rankless = delta.rank == 0 and delta.alpha == 0  # an alpha of 0 is read as one that switches off
    return Delta(delta.name, tensors, 1.0 if rankless else delta.alpha)


# ---------------------------------------------------------------------------------------------------------------------
# what is known beforehand


def common_alphas(changes: Changes) -> dict[str, float]:
    """The alpha that most LoRAs and DoRAs of each component have; 1 where there are none."""
    ranked = {name: [d for d in own if "lora_up.weight" in d.tensors and d.alpha] for name, own in changes.items()}
    return {component: common_alpha(own) or 1.0 for component, own in ranked.items()}


def header_of(
    said: Mapping[str, str], target: Path, info: BaseInfo, shape: Shape, baked: BakedFacts | None, tensors: TensorWriter
) -> dict[str, str]:
    """The header of a file that was made of one other: what that said, but for what its tensors were."""
    return rewritten(believable(said, info), target.stem, info, shape, baked, tensors)


def believable(said: Mapping[str, str], info: BaseInfo) -> dict[str, str]:
    """A header without a family that the file is not of, because A1111 and Forge show it for the one it names."""
    kept = {key: value for key, value in said.items() if key not in (ALPHAS, "ss_v2")}
    if not said.get("ss_base_model_version", "").startswith(_VERSIONS[info.family]):
        kept.pop("ss_base_model_version", None)
    return kept


_VERSIONS: dict[FamilyName, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_"}
"""How `ss_base_model_version` begins."""


def require_names(source: Path, base: Base, changes: Changes) -> None:
    """Every layer must have a name that all clients know.

    Raises:
        UserError: naming those that have none.
    """
    unknown = []
    for component, delta in layers(changes):
        try:
            base_name(base.info.family, component, delta.name, "kohya", int(base.unet.config["layers_per_block"]))
        except ExportError:
            unknown.append(f"{component}.{delta.name}")
    if unknown:
        what = f"changes {len(unknown)} layers that some clients drop: {', '.join(unknown[:_SHOWN])}"
        blocks = " ".join(f"--block {name}=0" for name in unknown[:_NAMED]) + (" ..." if unknown[_NAMED:] else "")
        fix = f"Leave them out, which the result will lack: lorasmith merge {source} {blocks} --out FILE"
        raise UserError(what, str(source), fix)


def require_diffusers(source: Path, changes: Changes) -> None:
    """Every change must be one that diffusers has a format for.

    Raises:
        UserError: naming the kinds that it has none for.
    """
    kinds = dict.fromkeys(why for component, delta in layers(changes) if (why := _unread(component, delta)))
    if kinds:
        what = f"cannot be written for diffusers, which does not read {' and '.join(kinds)}"
        fix = f"Take --format kohya, or make a plain LoRA of it: lorasmith resize {source} --rank 32 "
        raise UserError(what, str(source), f"{fix}--format diffusers --out FILE")


def _unread(component: str, delta: Delta) -> str:
    """What diffusers does not read of a change; empty if it reads it."""
    if delta.form not in ("lora", "dora"):
        return {"loha": "LoHa", "lokr": "LoKr", "full": "full changes"}[delta.form]
    if delta.form == "dora":
        plain = _product(delta).is_plain
        rows = delta.tensors["dora_scale"].shape[0] > 1
        return "" if plain and rows and component == "unet" else _DORAS[component == "unet"]
    return ""


_DORAS = {True: "DoRAs of other kinds than its own", False: "DoRAs of text encoders"}

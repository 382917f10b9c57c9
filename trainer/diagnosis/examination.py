"""A LoRA file of anybody, examined against a base: what is wrong with it, who reads it, and how much it changes.

With a base that is named, its weights are loaded: the file is merged into them as this project reads it, and put on
them by diffusers' own loader, and both must answer the same to fixed inputs. Without one, the published model of the
file's family lends its shapes, and no model is run.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ...datasets.workers import Progress
from ..adapter import strength
from ..anatomy import skeleton
from ..architectures import FAMILY_TITLES, PUBLISHED
from ..bases import inspect_base
from ..clients.reading import ClientReading, read_by_clients
from ..delta import Changes, Delta
from ..errors import UserError, first_line
from ..lorafile import LoraFile, guess_family
from ..loraread import merged, read_lora
from ..models import Base, load_base
from ..tensorfile import DTYPE_NAMES
from ..verify import (
    EFFECT_TOLERANCE,
    MOST,
    REFUSALS,
    Layer,
    Said,
    answer_errors,
    answers_of,
    load_as_users_do,
    plain_difference,
    plain_size,
)
from .finding import Finding
from .findings import SEVERITIES, findings
from .inspection import components

_ROUNDING = {"F16": 2.0**-11, "BF16": 2.0**-9, "F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3}
"""What storing a number in a type changes in it at most, as a share; of types that keep more, nothing is said."""
_LEAST = 1e-12  # |weight| of a layer that was left at zero
_NOTHING = 1e-6
"""A smaller share of an answer is what arithmetic does, not a LoRA."""


@dataclass(frozen=True)
class Sizes:
    """How large the changes of one component's layers are, in Frobenius norms."""

    relative: bool
    """Whether they are shares of the layers' own weights: |change| / |weight|; else |change| itself."""
    mean: float
    largest: float
    largest_in: str
    """The layer's path."""
    lost_as_fp16: float | None
    """The largest |error| / |change| that writing the tensors as fp16 would make, 1 where it overflows; None if none is
    larger than that."""


@dataclass(frozen=True)
class Effect:
    """What the file changes in the answer of one component, at strength 1."""

    share: float
    """|with - without| / |without|."""
    diffusers_error: float | None
    """|as diffusers loads it - as this project reads it| / |effect|; None if diffusers does not load it."""


@dataclass(frozen=True)
class Examination:
    """All that is known of a file."""

    file: LoraFile
    base: Base | None
    """Shapes; None if the family is not known."""
    is_named: bool
    """Whether the base was named, and so loaded; else it is the published model of the family."""
    findings: list[Finding]
    """The most severe first."""
    is_read: bool = False
    """Whether this project reads all that the file changes."""
    readings: Sequence[ClientReading] = ()
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    """Empty unless a base was named."""
    precision: str = ""
    """In which the base was run; empty if it was not."""

    @property
    def works(self) -> bool:
        """Whether it was read, and there is no error: it does what it should in the clients that read its kind."""
        return self.is_read and not self.count("error")

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def bytes(self) -> int:
        return self.file.path.stat().st_size

    @property
    def bytes_as_fp16(self) -> int:
        """What the file would take if no tensor were of a larger type."""
        wide = (math.prod(self.file.shapes[key]) * max(0, _BYTES[dtype] - 2) for key, dtype in self.file.dtypes.items())
        return self.bytes - sum(wide)

    def facts(self) -> dict[str, Any]:
        """For machines, ready for JSON."""
        family, because = guess_family(self.file)
        types = Counter(self.file.dtypes.values())
        return {
            "file": self.file.path.name,
            "bytes": self.bytes,
            "bytes_as_fp16": self.bytes_as_fp16,
            "dtypes": {dtype: {"tensors": n, "rounding": _ROUNDING.get(dtype)} for dtype, n in types.items()},
            "format": self.file.format or "unknown",
            "family": family or "unknown",
            "family_because": because,
            "base": self.base.info.short_name if self.base else None,
            "base_is_named": self.is_named,
            "works": self.works,
            "findings": [asdict(finding) for finding in self.findings],
            "clients": [asdict(reading) for reading in self.readings],
            "components": {
                name: {"layers": found["modules"]}
                | {counter: found[counter] for counter in ("forms", "ranks", "alphas")}
                | {"change": asdict(self.sizes[name]) if name in self.sizes else None}
                | {"effect": asdict(self.effects[name]) if name in self.effects else None}
                for name, found in components(self.file).items()
            },
            "precision": self.precision or None,
        }


_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def examine_file(path: Path, model: str = "", progress: Progress | None = None) -> Examination:
    """Examine a file, on the base that it was made for, or on shapes alone. Nothing is written.

    `progress` counts the layers that are measured.

    Raises:
        UserError: if the file is not whole, or is no safetensors file.
        BaseModelError: if there is no such base.
    """
    file = LoraFile.open(path)
    family, because = guess_family(file)
    if not (model or family):
        what = f"is for a base that cannot be told: {because}"
        untold = Finding("error", "the file", what, "Name the base it was made for with --base.")
        told = findings(file)
        is_told = any(finding.severity == "error" for finding in told)
        return Examination(file, None, False, told if is_told else [untold, *told])
    shapes = skeleton(inspect_base(model or PUBLISHED[family or "sd1"]))
    told = findings(file, shapes)
    readings = read_by_clients(file, shapes)
    changes = _changes(file, shapes, told)
    found = Examination(file, shapes, bool(model), told, bool(changes), readings)
    if not changes:
        return found
    if not model:
        return replace(found, sizes=_sizes(changes, shapes, False, progress))
    base = load_base(shapes.info, _precision(shapes, changes))
    sizes = _sizes(changes, base, True, progress)
    effects, seen = _effects(file, base, changes)
    new = [finding for finding in seen if not _is_told(finding, told)]
    told = sorted([*told, *new], key=lambda finding: SEVERITIES.index(finding.severity))
    precision = str(base.dtype).removeprefix("torch.")
    return replace(found, findings=told, sizes=sizes, effects=effects, precision=precision)


def _is_told(still: Finding, told: Sequence[Finding]) -> bool:
    """Whether the tensors told already that a part does nothing."""
    return any(still.where == finding.where and finding.what.startswith("does nothing") for finding in told)


def _changes(file: LoraFile, base: Base, told: list[Finding]) -> Changes:
    """What the file changes, as this project reads it; nothing, and a word among the findings, if it does not."""
    try:
        return read_lora(file.path, base.components, base.info.family)
    except UserError as error:
        if not any(finding.severity == "error" for finding in told):
            what, fix = error.problems[0].what, error.problems[-1].fix
            told.insert(0, Finding("warning", "the file", f"could not be tried: {what}", fix))
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# how large its changes are


def _sizes(changes: Changes, base: Base, relative: bool, progress: Progress | None) -> dict[str, Sizes]:
    """By component. A DoRA's change is not known without the base's weights: then its layers are left out."""
    found, done, total = {}, 0, sum(len(own) for own in changes.values())
    for component, own in changes.items():
        measured: dict[str, float] = {}
        lost: list[float] = []
        for delta in own:
            done += 1
            weight = Layer(delta, base.components[component]).weight
            if delta.form != "dora" or relative:
                size = _norm(delta, weight)
                measured[delta.name] = size / max(float(weight.double().norm()), _LEAST) if relative else size
                lost += [_lost_as_fp16(delta, size)] if delta.is_plain and size and _is_wide(delta) else []
            if progress:
                progress(done, total)
        if measured:
            most = max(measured, key=lambda name: measured[name])
            mean = sum(measured.values()) / len(measured)
            found[component] = Sizes(relative, mean, measured[most], most, max(lost, default=None))
    return found


def _norm(delta: Delta, weight: torch.Tensor) -> float:
    """|change|; of the weight, which may be a shape alone, only a DoRA needs more than that."""
    if delta.is_plain:
        return plain_size(delta)
    weight = torch.empty_like(weight, device="cpu") if weight.device.type == "meta" else weight
    return float(delta.of(weight.float()).double().norm())


def _is_wide(delta: Delta) -> bool:
    return any(tensor.dtype.itemsize > 2 for tensor in delta.tensors.values())


def _lost_as_fp16(delta: Delta, size: float) -> float:
    halved = {leaf: tensor.half() for leaf, tensor in delta.tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halved.values()):
        return 1.0
    return plain_difference(delta, Delta(delta.name, halved, delta.alpha)) / size


# ---------------------------------------------------------------------------------------------------------------------
# what it does


def _precision(shapes: Base, changes: Changes) -> torch.dtype:
    """fp32 if a base and a copy of the weights that change fit into memory in it, else bf16, whose rounding shows."""
    whole = sum(weight.numel() for module in shapes.components.values() for weight in module.parameters())
    layers = [Layer(delta, shapes.components[name]) for name, own in changes.items() for delta in own]
    copies = sum(layer.weight.numel() for layer in layers)
    return torch.float32 if 4 * (whole + copies) < psutil.virtual_memory().available else torch.bfloat16


def _effects(file: LoraFile, base: Base, changes: Changes) -> tuple[dict[str, Effect], list[Finding]]:
    """By component; and what is wrong with them.

    Both readings act on the same base, one after the other, so that memory holds one.
    """
    with torch.no_grad():
        said = answers_of(base, changes, partial(merged, base.components, changes), MOST)
    told = list(_stillness(said))
    errors: dict[str, float] = {}
    if told_of := [finding for finding in told if finding.severity == "error"]:
        return {name: Effect(_share(live), None) for name, live in said.items() if math.isfinite(live.effect)}, told_of
    if file.format == "diffusers" or all(delta.is_plain for own in changes.values() for delta in own):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it leaves out shows in the answers
                load_as_users_do(base, file.path)
        except REFUSALS as error:
            what = f"diffusers does not load it: {shown_line(error)}"
            told.append(Finding("error", "the file", what, "Write it anew with lorasmith convert."))
        else:
            errors = answer_errors(base, said, partial(strength, base))
            told += _differences(base, said, errors)
    off = {
        name: error / said[name].shown for name, error in errors.items() if math.isfinite(error) and said[name].shown
    }
    return {name: Effect(_share(live), off.get(name)) for name, live in said.items()}, told


def shown_line(error: Exception) -> str:
    """What a library says, on one line."""
    return first_line(error)[:200].rstrip(" .")


def _share(live: Said) -> float:
    return live.effect / live.whole if live.whole else 0.0


def _stillness(said: Mapping[str, Said]) -> Iterator[Finding]:
    """Components that answer as without the file, or no longer with numbers."""
    broken = [name for name, live in said.items() if not math.isfinite(live.effect)]
    still = [name for name, live in said.items() if _share(live) <= _NOTHING]
    for name in broken:
        what = "its answer holds NaN or infinity with the file at strength 1"
        yield Finding("error", name, what, "Take an earlier checkpoint.")
    if len(still) == len(said):
        what = "does nothing: the base answers as without it"
        yield Finding("error", "the file", what, "It was not trained; take a later checkpoint.")
    else:
        for name in still:
            what = "does nothing: it answers as without the file"
            yield Finding("warning", name, what, "Take a later checkpoint, or leave this part out.")


def _differences(base: Base, said: Mapping[str, Said], errors: Mapping[str, float]) -> Iterator[Finding]:
    for name, error in errors.items():
        live = said[name]
        if not live.is_met(error, EFFECT_TOLERANCE[base.dtype], base.dtype):
            what = f"diffusers makes another change of it than the file holds: off by {error / live.shown:.1%} of it"
            yield Finding("error", name, what, "Write it anew with lorasmith convert.")


# ---------------------------------------------------------------------------------------------------------------------
# for a person


def report(examination: Examination) -> list[str]:
    """Lines for a person: what the file is, the findings, who reads it, and what it does."""
    file, base = examination.file, examination.base
    family, because = guess_family(file)
    title = f"for {FAMILY_TITLES[family]}, because {because}" if family else f"for a base that is not known: {because}"
    lines = [f"{file.path.name}: {title}", *_size_lines(examination)]
    if base and not examination.is_named:
        published = f"a published {FAMILY_TITLES[base.info.family]}"
        lines.append(f"without --base: held against the shapes of {published}; what it does was not tried")
    lines += _group("", [str(finding) for finding in examination.findings])
    lines += _group("", _component_lines(examination))
    lines += _group("", _client_lines(examination))
    lines += _group("", _effect_lines(examination))
    return [*lines, "", verdict(examination)]


def verdict(examination: Examination) -> str:
    """One sentence: whether the file does what it should."""
    errors, warned = examination.count("error"), examination.count("warning")
    if errors:
        return f"verdict: it does not work as it should: {_many(errors, 'error')}, {_many(warned, 'warning')}."
    tried = "it works" if examination.effects else "nothing speaks against it" if examination.is_read else "not known"
    return f"verdict: {tried}" + (f"; {_many(warned, 'warning')} to look at." if warned else ".")


def _group(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *lines] if lines else []


def _size_lines(examination: Examination) -> Iterator[str]:
    types = Counter(examination.file.dtypes.values())
    told = [f"{count} tensors of {dtype}{_rounds(dtype)}" for dtype, count in types.most_common()]
    line = f"{examination.bytes:,} bytes: {', '.join(told) or 'no tensors'}"
    if examination.bytes_as_fp16 < 0.95 * examination.bytes:
        lost = [sizes.lost_as_fp16 for sizes in examination.sizes.values() if sizes.lost_as_fp16 is not None]
        cost = f", with changes off by {max(lost):.2%} at most" if lost else ""
        line += f"; as fp16 it would have {examination.bytes_as_fp16:,} bytes{cost}"
    yield line


def _rounds(dtype: str) -> str:
    return f" (each number within {_ROUNDING[dtype]:.2%})" if dtype in _ROUNDING else ""


def _component_lines(examination: Examination) -> list[str]:
    found = components(examination.file)
    if not found:
        return []
    relative = any(sizes.relative for sizes in examination.sizes.values())
    size = "|change| / |weight|" if relative else "|change|"
    rows: list[tuple[str, ...]] = [("component", "layers", "kind", "rank", "alpha", f"{size}, mean", "largest", "in")]
    for name, entry in found.items():
        sizes = examination.sizes.get(name)
        told = (f"{sizes.mean:.3g}", f"{sizes.largest:.3g}", sizes.largest_in) if sizes else ("", "", "")
        kinds = (" ".join(_few(entry[counter])) for counter in ("forms", "ranks", "alphas"))
        rows.append((name, str(entry["modules"]), *kinds, *told))
    return _aligned(rows)


def _few(counts: Mapping[str, int]) -> list[str]:
    """The most common three."""
    names = [name for name, _ in Counter(counts).most_common()]
    return names[:3] + (["..."] if len(names) > 3 else [])


def _client_lines(examination: Examination) -> list[str]:
    rows = [(r.client, r.reading, f"{r.layers} of {r.of} layers", _line(r.why)) for r in examination.readings]
    return _aligned([("client", "reads", "", ""), *rows]) if rows else []


def _effect_lines(examination: Examination) -> list[str]:
    lines = []
    for name, effect in examination.effects.items():
        off = effect.diffusers_error
        also = "" if off is None else f"; as diffusers loads it, off by {off:.2%} of that"
        lines.append(f"{name}: at strength 1 it changes {effect.share:.2%} of the answer{also}")
    return lines


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _line(text: str) -> str:
    return " ".join(text.split())


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

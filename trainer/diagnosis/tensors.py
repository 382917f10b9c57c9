"""What is wrong with the tensors of a LoRA file: their shapes and types, and, layer by layer, their numbers.

Shapes and types come from the header. Then the file is read once, one layer at a time, and what was seen of a layer is
kept in a few numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..keys import ALPHA
from ..lorafile import FP8
from .finding import Case, Finding, Layer, Severity, found
from .names import is_known

_AGAIN = "Save it again from the run that made it."
_LARGEST_FP16 = 65504.0
_SMALLEST_FP16 = 2.0**-14  # below it fp16 keeps fewer bits, the smaller the number
_DOWN, _UP = "lora_down.weight", "lora_up.weight"


def tensor_findings(case: Case) -> Iterator[Finding]:
    """All that shapes, types and numbers tell."""
    layers = [layer for layer in case.layers if layer.form and is_known(layer)]
    yield from _types(case, layers)
    yield from _ranks(layers)
    if case.base and not case.is_of_other_family:
        yield from _misfits(case)
    yield from _flat_projections(case, layers)
    seen = {layer.name: _look(layer, tensors) for layer, tensors in _read(case, layers)}
    yield from _alphas(case, layers)
    yield from _broken(seen)
    yield from _still(layers, seen)
    yield from _sizes(seen)


# ---------------------------------------------------------------------------------------------------------------------
# by the header


_FP8 = "is of fp8, which keeps 3 or 4 bits of each number; older clients do not read it"
_TYPES: dict[str, tuple[Severity, str, str]] = {
    "F32": ("note", "", ""),
    "F16": ("note", "", ""),
    "BF16": ("note", "is of bf16, which keeps 8 bits of a number where fp16 keeps 11; numpy does not read it", ""),
    "F64": ("note", "is of fp64, four times as large as fp16 for nothing that can be seen", ""),
    **dict.fromkeys(FP8, ("warning", _FP8, "Use the fp16 file of it, if there is one.")),
}
"""What there is to say of a type; of the first two, nothing."""
_WHOLE: tuple[Severity, str, str] = ("error", "is of a type of whole numbers, which no client scales", _AGAIN)


def _types(case: Case, layers: list[Layer]) -> Iterator[Finding]:
    by_type: dict[str, list[str]] = {}
    for layer in layers:
        for leaf, key in layer.keys.items():
            if leaf != ALPHA:
                by_type.setdefault(case.file.dtypes[key], []).append(key)
    for dtype, keys in by_type.items():
        severity, what, fix = _TYPES.get(dtype, _WHOLE)
        yield from found(severity, keys if what else [], what, fix)


def _ranks(layers: list[Layer]) -> Iterator[Finding]:
    """Factors of one product must be of one rank."""
    odd = [layer for layer in layers if not layer.has_product]
    if odd:
        down, up = (_by(odd[0].shapes.get(leaf)) for leaf in (_DOWN, _UP))
        what = f"its factors are of different ranks, or no matrices: down is {down}, up is {up}"
        yield from found("error", [layer.name for layer in odd], what, _AGAIN, "layers")


def _misfits(case: Case) -> Iterator[Finding]:
    """Products must be of the shape of the base's weights."""
    assert case.base
    if case.misfits:
        first, shape = case.misfits[0]
        sizes = " and ".join(_by(size) for leaf, size in first.shapes.items() if leaf != ALPHA)
        what = f"does not fit the layer of {case.base.info.short_name}: {sizes} make no change of {_by(shape)}"
        names = [layer.name for layer, _ in case.misfits]
        yield from found("error", names, what, "Name the base that it was made for.", "layers")


def _flat_projections(case: Case, layers: list[Layer]) -> Iterator[Finding]:
    """SD 1 projects into its attention with 1x1 convolutions, SD 2 and SDXL with linear layers."""
    dimensions = {"sd1": 4, "sd2": 2, "sdxl": 2}.get(case.family or "")
    projections = [layer for layer in layers if layer.name.endswith(("proj_in", "proj_out")) and _DOWN in layer.shapes]
    odd = [layer.name for layer in projections if dimensions and len(layer.shapes[_DOWN]) != dimensions]
    kind = "a convolution, of 4 dimensions" if dimensions == 4 else "a linear layer, of 2 dimensions"
    what = f"is not of the dimensions of the base's layer, which is {kind}: sd-scripts does not read it"
    yield from found("warning", odd, what, "Write it anew with lorasmith convert.", "layers")


def _by(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


# ---------------------------------------------------------------------------------------------------------------------
# by the numbers


@dataclass(frozen=True)
class _Seen:
    """What was seen of one layer."""

    broken: list[str]
    """Keys of tensors that hold NaN or infinity."""
    large: list[str]
    """Keys of those with a number beyond fp16."""
    small: list[str]
    """Keys of those with no number that fp16 keeps all bits of."""
    is_still: bool
    """Whether a factor of its product is zero."""


def _read(case: Case, layers: list[Layer]) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
    """The layers with their tensors, one after the other."""
    leaves = {layer.name: [leaf for leaf in layer.keys if leaf != ALPHA] for layer in layers}
    tensors = case.file.read(layer.keys[leaf] for layer in layers for leaf in leaves[layer.name])
    for layer in layers:
        yield layer, {leaf: next(tensors)[1] for leaf in leaves[layer.name]}


def _look(layer: Layer, tensors: Mapping[str, Tensor]) -> _Seen:
    broken, large, small, zero = [], [], [], False
    for leaf, tensor in tensors.items():
        if not tensor.numel():
            continue
        most = float(tensor.abs().max()) if tensor.is_floating_point() else float(tensor.double().abs().max())
        if not math.isfinite(most):
            broken.append(layer.keys[leaf])
        elif most > _LARGEST_FP16:
            large.append(layer.keys[leaf])
        elif 0 < most < _SMALLEST_FP16:
            small.append(layer.keys[leaf])
        zero |= most == 0 and leaf != "dora_scale"
    return _Seen(broken, large, small, zero and layer.form != "dora")


def _alphas(case: Case, layers: list[Layer]) -> Iterator[Finding]:
    """Alphas that clients read in different ways."""
    given = {layer.name: layer.keys[ALPHA] for layer in layers if ALPHA in layer.keys}
    missing = [layer.name for layer in layers if layer.rank and layer.name not in given and "." not in layer.name]
    yield from found("warning", missing, _NO_ALPHA, "If it was trained at another alpha, save it again.", "layers")
    several = [key for key in given.values() if case.file.count(key) != 1]
    yield from found("error", several, "is not one number, and A1111 and ComfyUI break off there", _AGAIN)
    whole = [key for key in given.values() if not case.file.dtypes[key].startswith(("F", "BF"))]
    yield from found("warning", whole, _WHOLE_ALPHA, "Write it anew with lorasmith convert.")
    alphas = {given[name]: alpha for name, alpha in case.alphas.items() if name in given}
    broken = [key for key, alpha in alphas.items() if not math.isfinite(alpha)]
    yield from found("error", broken, "is NaN or infinity, and so becomes the picture", _AGAIN)
    zero = [key for key, alpha in alphas.items() if alpha == 0]
    yield from found("error", zero, "is 0: the layer does nothing, and in sd-scripts acts at scale 1", _AGAIN)
    negative = [key for key, alpha in alphas.items() if alpha < 0]
    yield from found("warning", negative, "is negative, which turns the change around", "Use it if that is meant.")
    yield from _mixed_alphas(case, layers)
    whole_factors = [layer.name for layer in layers if layer.form == "lokr" and not layer.rank]
    idle = [given[name] for name in whole_factors if case.alphas.get(name, 1.0) != 1]
    yield from found("note", idle, "has no effect: beside two whole factors of a LoKr no client reads it")


_NO_ALPHA = "has no alpha: clients take its rank for it, so that the change acts at scale 1"
_WHOLE_ALPHA = "is of a type of whole numbers, at which stable-diffusion.cpp ends"


def _mixed_alphas(case: Case, layers: list[Layer]) -> Iterator[Finding]:
    """diffusers applies a component's most common alpha to its attention; to convolutions each its own."""
    for component in dict.fromkeys(layer.component for layer in layers):
        own = [layer for layer in layers if layer.component == component and layer.form == "lora"]
        alphas = {layer.name: case.alphas.get(layer.name, float(layer.rank)) for layer in own}
        most = Counter(alphas.values()).most_common(1)
        odd = [layer.name for layer in own if not layer.is_convolution and alphas[layer.name] != most[0][0]]
        if odd and "." not in odd[0]:
            what = f"has alpha {alphas[odd[0]]:g} where most of {component} have {most[0][0]:g}, which diffusers takes"
            fix = "Write it anew with lorasmith convert, which makes them equal."
            yield from found("warning", odd, f"{what} for all", fix, "layers")


def _broken(seen: Mapping[str, _Seen]) -> Iterator[Finding]:
    keys = [key for layer in seen.values() for key in layer.broken]
    yield from found("error", keys, "holds NaN or infinity, and so becomes the picture", "Take an earlier checkpoint.")


def _still(layers: list[Layer], seen: Mapping[str, _Seen]) -> Iterator[Finding]:
    """Layers whose product is zero: the file, a component, or some."""
    still = [layer for layer in layers if seen[layer.name].is_still]
    if layers and len(still) == len(layers):
        yield Finding("error", "the file", "does nothing: all its changes are zero", "It was not trained; " + _LATER)
        return
    for component in dict.fromkeys(layer.component for layer in still):
        own = [layer.name for layer in still if layer.component == component]
        if len(own) == sum(layer.component == component for layer in layers):
            what = f"does nothing: the changes of all its {len(own)} layers are zero"
            yield Finding("error", component, what, "It was not trained; " + _LATER)
        else:
            yield from found("note", own, f"does nothing, while other layers of {component} do", "", "layers")


_LATER = "take a later checkpoint, or leave it out."


def _sizes(seen: Mapping[str, _Seen]) -> Iterator[Finding]:
    """Numbers that half precision cannot hold, or not well."""
    large = [key for layer in seen.values() for key in layer.large]
    what = f"holds numbers beyond {_LARGEST_FP16:,.0f}, which become infinity in the fp16 that clients calculate in"
    yield from found("warning", large, what, "Take an earlier checkpoint.")
    small = [key for layer in seen.values() for key in layer.small]
    what = "holds only numbers below 0.00006, of which fp16 keeps the fewer bits the smaller they are"
    yield from found("note", small, what)

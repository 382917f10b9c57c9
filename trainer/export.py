"""The file to share: the adapter's weights under names that clients read, written, read back and compared.

The weights are taken from the live PEFT layers, with the scale they really apply, or from plain LoRAs baked of them.
An export is done only when the file on disk was loaded into a fresh pipeline and found to be the same as the trained
model (`verify`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter import ADAPTER, scale_of, tuner_layers
from .delta import Changes, Delta, refactored
from .errors import ExportError, Problem
from .files import until_verified
from .keys import ALPHA, Format, base_name, component_of, leaf_of
from .lorafile import Hashes, LoraFile
from .models import Base
from .sharing.metadata import Facts, Shape, build
from .tensorfile import Header, tensor_writer
from .verify import (
    WEIGHT_TOLERANCE,
    Verification,
    is_still,
    live_changes,
    plain_difference,
    plain_size,
    tensor_names,
    verify,
)

Precision = Literal["fp16", "fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
_SMALL = 2.0**-8  # fp16 is exact to 11 bits down to 2**-14; smaller matrices than this share their size with another


@dataclass(frozen=True)
class Exported:
    """A LoRA file on disk."""

    path: Path
    format: Format
    precision: Precision
    bytes: int
    keys: dict[str, int]
    """Tensors by component."""
    hashes: Hashes
    verification: Verification | None = None
    """None until the file was loaded back and compared."""


def export(
    base: Base,
    path: Path,
    facts: Facts,
    load_fresh: Callable[[], Base],
    format: Format = "kohya",
    precision: Precision = "fp16",
    changes: Changes | None = None,
) -> Exported:
    """Write a file and verify it; only then it takes its name, and the place of an earlier one.

    `load_fresh` gives the same base without an adapter, in the precision and on the device of `base`. In place of what
    the live adapters change, `changes` may be written, and the file is then compared with them.

    Raises:
        ExportError: if what is on disk is not the same as the live model.
    """
    with until_verified(path) as unverified:
        exported = write(base, unverified, format, facts, precision, changes)
        verification = verify(unverified, base, load_fresh, changes)
    return dataclasses.replace(exported, path=path, verification=verification)


def write(
    base: Base,
    path: Path,
    format: Format,
    facts: Facts,
    precision: Precision = "fp16",
    changes: Changes | None = None,
) -> Exported:
    """Write the `.safetensors` file with its metadata, whole or not at all; it is not compared yet.

    Raises:
        ExportError: if the adapter cannot be written as it is.
    """
    written = castable(base, changes, format, DTYPES[precision])
    header = partial(build, facts, base.info, shape_of(base, written))
    return save(path, tensors(base, written, format), header, format, precision)


def save(path: Path, weights: Mapping[str, Tensor], header: Header, format: Format, precision: Precision) -> Exported:
    """Write tensors and what the header says of them, whole or not at all."""
    with tensor_writer(path.parent) as writer:
        for key, tensor in weights.items():
            writer.add(key, tensor)
        writer.write(path, header(writer))
    return Exported(
        path=path,
        format=format,
        precision=precision,
        bytes=path.stat().st_size,
        keys=dict(Counter(component_of(key) or "unknown" for key in weights)),
        hashes=LoraFile.open(path).hashes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# tensors


def tensors(base: Base, written: Changes, format: Format) -> dict[str, Tensor]:
    """All tensors of the file by their keys: those of each change, and in kohya's format `alpha` () in fp32."""
    weights: dict[str, Tensor] = {}
    for component, changes in written.items():
        for delta in changes:
            weights |= layer_tensors(base, component, delta, format)
    return weights


def layer_tensors(base: Base, component: str, delta: Delta, format: Format) -> dict[str, Tensor]:
    """Those of one layer; of `base`, shapes are enough.

    Raises:
        ExportError: for a layer that not all clients know, and for what diffusers does not read.
    """
    name = base_name(base.info.family, component, delta.name, format, int(base.unet.config["layers_per_block"]))
    own = dict(delta.tensors) | {ALPHA: torch.tensor(delta.alpha, dtype=torch.float32)}
    if format == "diffusers" and "dora_scale" in own:
        own["dora_scale"] = _lengths_of_peft(own["dora_scale"])
    return {name + leaf_of(leaf, format): own[leaf] for leaf in tensor_names(delta, format)}


def _lengths_of_peft(lengths: Tensor) -> Tensor:
    """(out, 1) to (out,), and of a convolution (out, 1, 1, 1) to (1, out, 1, 1)."""
    return lengths.flatten() if lengths.dim() == 2 else lengths.transpose(0, 1).contiguous()


def castable(base: Base, changes: Changes | None, format: Format, dtype: torch.dtype) -> dict[str, list[Delta]]:
    """The changes as they are written, on the CPU and contiguous; without `changes` those of the live layers.

    A plain LoRA or DoRA has the same alpha in all layers of a component, because diffusers applies one to all its
    attention layers; for diffusers' own format, which has none, it is the rank. Differences go into `up`.

    Raises:
        ExportError: if a layer cannot be written, holds NaN or infinity, or a whole component has no effect.
    """
    changes = trained_changes(base) if changes is None else changes
    _require(_unread_by_diffusers(changes) if format == "diffusers" else iter(()))
    written: dict[str, list[Delta]] = {}
    for component, deltas in changes.items():
        alpha = common_alpha(deltas)
        rounded = [cast(delta, alpha if format == "kohya" else float(delta.rank), dtype) for delta in deltas]
        _require(_broken(component, rounded))
        if rounded:
            written[component] = rounded
    if not written:
        raise ExportError("the model carries no adapter", "export", "Train one, or load the run's checkpoint first.")
    return written


def trained_changes(base: Base) -> dict[str, list[Delta]]:
    """What the live adapters change, by component, on the CPU.

    Raises:
        ExportError: if they do not act as they were trained.
    """
    for component, module in base.components.items():
        _require(_unfit(component, module))
    return live_changes(base)


def common_alpha(layers: Sequence[Delta]) -> float:
    """The alpha most layers of a component have, as fp32 holds it."""
    counts = Counter(float(torch.tensor(delta.alpha, dtype=torch.float32)) for delta in layers)
    return counts.most_common(1)[0][0] if counts else 0.0


def cast(delta: Delta, alpha: float, dtype: torch.dtype) -> Delta:
    """The same change in another precision; a LoRA or DoRA with this alpha, all others with their own.

    The lengths of a DoRA stay fp32: next to them its change is so small that half precision would lose it. So does a
    full change that is too small for fp16, because no other factor can take a part of its size.
    """
    exact = {leaf: tensor.float().cpu() for leaf, tensor in delta.tensors.items()}
    lengths = {leaf: exact.pop(leaf).contiguous() for leaf in ("dora_scale",) if leaf in exact}
    fold = 1.0
    if "lora_up.weight" not in exact:
        alpha = delta.alpha
    elif (fold := float(torch.tensor(delta.alpha / alpha, dtype=torch.float32))) != 1:
        exact["lora_up.weight"] = exact["lora_up.weight"] * fold
    plain, limit = Delta("", exact, 1.0).is_plain, WEIGHT_TOLERANCE[dtype] / 2
    # what has this precision already has lost what its sizes make it lose, and is left as it is
    there = all(delta.tensors[leaf].dtype == dtype for leaf in exact) and (plain or fold == 1)
    rounded = _rounded(exact if there else _balanced(exact, dtype), dtype)
    if plain and _lost_in_cast(exact, rounded) > limit:
        down, up = refactored(exact["lora_down.weight"], exact["lora_up.weight"])
        rounded = _rounded(_balanced({"lora_down.weight": down, "lora_up.weight": up}, dtype), dtype)
    if "diff" in exact and _drowns(exact["diff"], rounded["diff"], limit):
        rounded = {"diff": exact["diff"].contiguous()}
    return Delta(delta.name, rounded | lengths, alpha)


def _balanced(factors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of the same product, none too small for a precision.

    A young adapter's `up` is so small that fp16 would keep few of its bits; a power of two, which is exact, is then
    moved from the largest factor to the smallest until both have about the same size.
    """
    sizes = {leaf: float(tensor.abs().max()) for leaf, tensor in factors.items()}
    small, large = min(sizes, key=lambda leaf: sizes[leaf]), max(sizes, key=lambda leaf: sizes[leaf])
    if dtype == torch.float16 and 0 < sizes[small] < min(_SMALL, sizes[large]) and math.isfinite(sizes[large]):
        share = 2.0 ** math.floor(math.log2(sizes[large] / sizes[small]) / 2)
        return factors | {large: factors[large] / share, small: factors[small] * share}
    return factors


def _rounded(factors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {leaf: tensor.to(dtype).contiguous().clone() for leaf, tensor in factors.items()}


def _lost_in_cast(exact: dict[str, Tensor], cast: dict[str, Tensor]) -> float:
    """|cast - exact| / |exact| of a plain LoRA: much where its parts cancel, as those of PiSSA do."""
    if all(torch.equal(tensor, cast[leaf].float()) for leaf, tensor in exact.items()):
        return 0.0
    before, after = Delta("", exact, 1.0), Delta("", cast, 1.0)
    size = plain_size(before)
    return plain_difference(before, after) / size if size > 0 and math.isfinite(size) else 0.0


def _drowns(exact: Tensor, cast: Tensor, share: float) -> bool:
    """Whether a finite tensor lost more than a share of its norm."""
    return bool(cast.isfinite().all()) and float((cast.float() - exact).norm()) > share * float(exact.norm())


def _unread_by_diffusers(changes: Changes) -> Iterator[Problem]:
    """What diffusers has no format for."""
    fix = "Take the kohya format, or bake a plain LoRA, which diffusers reads."
    for component, deltas in changes.items():
        forms = {delta.form for delta in deltas}
        for form in sorted(forms & {"loha", "lokr", "full"}):
            yield Problem(component, f"diffusers has no format for what is a {form}", fix)
        if component != "unet" and "dora" in forms:
            yield Problem(component, "diffusers does not load the lengths (DoRA) of a text encoder", fix)


def _unfit(component: str, module: nn.Module) -> Iterator[Problem]:
    """Live layers whose effect the file could not hold."""
    for name, layer in tuner_layers(module):
        where, scale, trained = f"{component}.{name}", scale_of(layer), _trained_scale(layer)
        if scale is not None and not math.isclose(scale, trained, rel_tol=1e-6):
            what = f"acts at strength {scale / trained:g}, not 1"
            yield Problem(where, what, "Leave the `strength` block before you export.")
        if layer.merged or layer.disable_adapters:
            yield Problem(where, "is merged or switched off", "Unmerge and enable the adapter before you export.")
        if list(layer.active_adapters) != [ADAPTER]:
            yield Problem(where, "carries another adapter", "Take the others off before you export.")
        if isinstance(layer, LoraLayer) and (_is_odd_variant(layer) or layer.lora_bias.get(ADAPTER)):
            fix = 'Use adapter.kind = "lora".'
            yield Problem(where, "is a variant of LoRA that clients read differently", fix)


def _trained_scale(layer: BaseTunerLayer) -> float:
    """alpha / rank as it was configured, of a layer that has them."""
    tuner: Any = layer
    if isinstance(layer, LoraLayer):
        rank = layer.r[ADAPTER]
        return layer.lora_alpha[ADAPTER] / (math.sqrt(rank) if layer.use_rslora.get(ADAPTER) else rank)
    return tuner.alpha[ADAPTER] / tuner.r[ADAPTER] if scale_of(layer) is not None else 1.0


def _is_odd_variant(layer: LoraLayer) -> bool:
    """Any variant but DoRA."""
    return bool(layer.lora_variant.get(ADAPTER)) and ADAPTER not in layer.lora_magnitude_vector


def _broken(component: str, written: Sequence[Delta]) -> Iterator[Problem]:
    """What went wrong in the weights of one component, seen after the cast."""
    for delta in written:
        for leaf, tensor in delta.tensors.items():
            if not tensor.isfinite().all():
                beyond = f"is beyond the range of {tensor.dtype}".replace("torch.", "")
                kind = "holds NaN" if tensor.isnan().any() else beyond
                fix = "Export an earlier checkpoint; train with a lower learning rate."
                yield Problem(f"{component}.{delta.name}.{leaf}", kind, fix)
    if written and all(is_still(delta) for delta in written):
        yield Problem(component, "was trained, but all its changes are zero", "Train longer, or switch this part off.")


def _require(problems: Iterator[Problem]) -> None:
    if found := list(problems):
        raise ExportError.of(found[:5])


def shape_of(base: Base, written: Changes) -> Shape:
    """What the header says of rank, alpha and reach."""
    layers = [(base.components[component], delta) for component, deltas in written.items() for delta in deltas]
    ranked = [delta for _, delta in layers if delta.rank]
    return Shape(
        ranks=tuple(delta.rank for delta in ranked),
        alphas=tuple(delta.alpha for delta in ranked),
        convolutions=any(_is_convolution(module.get_submodule(delta.name)) for module, delta in layers),
        form=layers[0][1].form,
    )


def _is_convolution(layer: Any) -> bool:
    own: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return own.weight[0, 0].numel() > 1

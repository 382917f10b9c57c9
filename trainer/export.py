"""The file to share: the adapter's weights under names that every client reads, written, read back and compared.

The weights are taken from the live PEFT layers, with the scale they really apply. An export is done only when the file
on disk was loaded into a fresh pipeline and found to be the same as the trained model (`verify`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import ADAPTER, LoraModule, lora_modules
from .errors import ExportError, Problem, UserError
from .files import atomic_file
from .keys import Format, base_name, component_of
from .lorafile import LEAVES, Hashes, LoraFile
from .metadata import Facts, Shape, build
from .models import Base
from .verify import Verification, verify

Precision = Literal["fp16", "fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
_SMALL = 2.0**-8  # fp16 is exact to 11 bits down to 2**-14; smaller matrices than this share their size with the other


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
) -> Exported:
    """Write a file and verify it; only then it takes its name, and the place of an earlier one.

    `load_fresh` gives the same base without an adapter, in the precision and on the device of `base`.

    Raises:
        ExportError: if what is on disk is not the same as the live model.
    """
    unverified = path.with_name(f"{path.stem}.unverified.safetensors")
    exported = write(base, unverified, format, facts, precision)
    verification = verify(unverified, base, load_fresh)
    unverified.replace(path)
    return dataclasses.replace(exported, path=path, verification=verification)


def write(base: Base, path: Path, format: Format, facts: Facts, precision: Precision = "fp16") -> Exported:
    """Write the `.safetensors` file with its metadata, whole or not at all; it is not compared yet.

    Raises:
        ExportError: if the adapter cannot be written as it is.
    """
    if path.suffix != ".safetensors":
        raise UserError("does not end in .safetensors", str(path), "Clients go by the ending: add it.")
    weights = tensors(base, format, DTYPES[precision])
    header = build(facts, base.info, _shape(weights, format), weights)
    with atomic_file(path) as temporary:
        save_file(weights, temporary, header)
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


def tensors(base: Base, format: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the file, on the CPU and contiguous, from the live layers.

    kohya: `lora_down.weight` (rank, in[, kh, kw]), `lora_up.weight` (out, rank[, 1, 1]) and `alpha` () in fp32, the
    same alpha in all layers of a component. diffusers: `lora_A.weight` and `lora_B.weight` of the same shapes, and no
    alpha: the scale alpha / rank is part of `lora_B`.

    Raises:
        ExportError: if a layer cannot be written, holds NaN or infinity, or a whole component has no effect.
    """
    weights: dict[str, Tensor] = {}
    family, per_block = base.info.family, int(base.unet.config["layers_per_block"])
    down_leaf, up_leaf, *alpha_leaf = LEAVES[format]
    for component, module in base.components.items():
        layers = list(lora_modules(module))
        _require(_unfit(component, module))
        alpha = common_alpha(layers)
        for lora in layers:
            name = base_name(family, component, lora.name, format, per_block)
            down, up = _cast(lora, alpha if alpha_leaf else lora.rank, dtype)
            weights |= {name + down_leaf: down, name + up_leaf: up}
            weights |= {name + leaf: torch.tensor(alpha, dtype=torch.float32) for leaf in alpha_leaf}
        _require(_broken(component, layers, weights, up_leaf))
    if not weights:
        raise ExportError("the model carries no adapter", "export", "Train one, or load the run's checkpoint first.")
    return weights


def common_alpha(layers: Sequence[LoraModule]) -> float:
    """The alpha most layers of a component have, as fp32 holds it.

    diffusers applies one alpha to all attention layers of a component, so that the others' differences go into `up`.
    """
    counts = Counter(float(torch.tensor(lora.alpha, dtype=torch.float32)) for lora in layers)
    return counts.most_common(1)[0][0] if counts else 0.0


def _cast(lora: LoraModule, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) whose product at `alpha` is the layer's own.

    A young adapter's `up` is so small that fp16 would keep few of its bits; a power of two, which is exact, is then
    moved from `down` to `up` until both have about the same size.
    """
    down = lora.down.float().cpu()
    up = lora.up.float().cpu()
    if (fold := float(torch.tensor(lora.alpha / alpha, dtype=torch.float32))) != 1:
        up = up * fold
    large, small = float(down.abs().max()), float(up.abs().max())
    if dtype == torch.float16 and 0 < small < min(_SMALL, large) and math.isfinite(large):
        share = 2.0 ** math.floor(math.log2(large / small) / 2)
        down, up = down / share, up * share
    return down.to(dtype).contiguous().clone(), up.to(dtype).contiguous().clone()


def _unfit(component: str, module: nn.Module) -> Iterator[Problem]:
    """Live layers whose effect the file could not hold."""
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.scaling:
            continue
        where, rank = f"{component}.{name}", layer.r[ADAPTER]
        trained = layer.lora_alpha[ADAPTER] / (math.sqrt(rank) if layer.use_rslora.get(ADAPTER) else rank)
        if not math.isclose(layer.scaling[ADAPTER], trained, rel_tol=1e-6):
            strength = layer.scaling[ADAPTER] / trained
            yield Problem(
                where, f"acts at strength {strength:g}, not 1", "Leave the `strength` block before you export."
            )
        if layer.merged or layer.disable_adapters:
            yield Problem(where, "is merged or switched off", "Unmerge and enable the adapter before you export.")
        if len(layer.scaling) > 1:
            yield Problem(where, "carries more than one adapter", "Take the others off before you export.")
        if layer.lora_variant.get(ADAPTER) or layer.lora_bias.get(ADAPTER):
            yield Problem(where, "is a variant of LoRA that clients read differently", 'Use adapter.kind = "lora".')


def _broken(component: str, layers: Sequence[LoraModule], weights: dict[str, Tensor], up: str) -> Iterator[Problem]:
    """What went wrong in the weights of one component, seen after the cast."""
    mine = {key: tensor for key, tensor in weights.items() if component_of(key) == component}
    for key, tensor in mine.items():
        if not tensor.isfinite().all():
            kind = (
                "holds NaN" if tensor.isnan().any() else f"is beyond the range of {tensor.dtype}".replace("torch.", "")
            )
            yield Problem(key, kind, "Export an earlier checkpoint; train with a lower learning rate.")
    if layers and not any(tensor.any() for key, tensor in mine.items() if key.endswith(up)):
        yield Problem(component, "was trained, but all its changes are zero", "Train longer, or switch this part off.")


def _require(problems: Iterator[Problem]) -> None:
    if found := list(problems):
        raise ExportError.of(found[:5])


def _shape(weights: dict[str, Tensor], format: Format) -> Shape:
    down, _, *alpha = LEAVES[format]
    downs = [tensor for key, tensor in weights.items() if key.endswith(down)]
    ranks = tuple(tensor.shape[0] for tensor in downs)
    alphas = tuple(float(tensor) for key, tensor in weights.items() if alpha and key.endswith(alpha[0]))
    return Shape(ranks, alphas or tuple(float(rank) for rank in ranks), any(t.shape[2:].numel() > 1 for t in downs))

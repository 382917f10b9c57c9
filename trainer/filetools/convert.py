"""A LoRA file of any trainer in the names that clients read: the same changes, and nothing is lost."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import torch

from ...datasets.workers import Progress
from ..delta import Delta
from ..errors import UserError
from ..export import DTYPES, Precision
from ..keys import ALPHA, Format
from ..lorafile import LoraFile
from ..tensorfile import TensorWriter
from .sources import layers, read_sources
from .writing import ALPHAS, Written, common_alphas, header_of, lora_writer, require_diffusers, require_names

_PRECISIONS: dict[torch.dtype, Precision] = {dtype: name for name, dtype in DTYPES.items()}


def convert_lora(
    source: Path,
    target: Path,
    format: Format = "kohya",
    base: str = "",
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write a file of any trainer in kohya's names (of LyCORIS' kinds too) or in diffusers', with one alpha for all
    layers of a component. Without `precision`, every layer keeps its own.

    `base` is the model that the file was made for; without it, the published one of the family that the file is
    recognised as. From kohya's names to diffusers' and back, keys, alphas and tensors are the same again: bit by bit if
    alpha / rank is a power of two and no number falls below fp16's range with it, else but for rounding.

    Raises:
        UserError: if the file cannot be read, is for a base that cannot be told, or holds what the
            format has no name for.
        ExportError: if what was written is not what was meant.
    """
    sources = read_sources([source], base)
    (read,) = sources.files
    require_names(source, sources.base, read.changes)
    if format == "diffusers":
        require_diffusers(source, read.changes)
    alphas = common_alphas(read.changes) | _remembered(read.file)
    kept = {key: value for key, value in read.file.metadata.items() if key.startswith("lorasmith_baked_")}
    total = sum(len(own) for own in read.changes.values())
    with lora_writer(target, sources.base, format, alphas) as writer:
        for done, (component, delta) in enumerate(layers(read.changes), start=1):
            writer.add(component, delta, precision or precision_of(delta))
            if progress:
                progress(done, total)

        def header(tensors: TensorWriter) -> dict[str, str]:
            return header_of(read.file.metadata, target, sources.info, writer.shape, None, tensors) | kept

        return writer.finish(header, lost={})


def precision_of(delta: Delta) -> Precision:
    """That of most of its numbers, but for the lengths of a DoRA, which are fp32 in most files; fp32 of all others."""
    sizes: Counter[torch.dtype] = Counter()
    for leaf, tensor in delta.tensors.items():
        sizes[tensor.dtype] += tensor.numel() if leaf != "dora_scale" else 0
    return _PRECISIONS.get(sizes.most_common(1)[0][0], "fp32")


def _remembered(file: LoraFile) -> dict[str, float]:
    """The alphas that became a part of the tensors when the file was written in diffusers' format.

    Raises:
        UserError: if the header's note of them is not one of ours.
    """
    if any(key.endswith(f".{ALPHA}") for key in file.shapes):
        return {}
    try:
        alphas = {str(name): float(alpha) for name, alpha in json.loads(file.metadata.get(ALPHAS, "{}")).items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError):
        alphas = {"": math.nan}
    if not all(math.isfinite(alpha) and alpha > 0 for alpha in alphas.values()):
        raise UserError(f"its header's {ALPHAS} are no alphas", str(file.path), "Convert it again from its original.")
    return alphas

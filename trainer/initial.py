"""Where adapters begin, if not at zero: at the base's largest directions, at those of the data, or at another LoRA.

PiSSA and OLoRA take the base's largest directions out of its weight. What is taken out is kept here, because the change
relative to the untouched base, which is what files and strengths are about, is the adapter's product minus that of its
first factors. EVA turns only the matrix that reads, so that the change is still zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from ..datasets.workers import Progress
from .delta import Delta
from .errors import ConfigError, Problem

_PISSA = "pissa_niter_16"  # by a randomised SVD (Halko et al. 2011), seconds in place of minutes for an SDXL


@dataclass(frozen=True)
class Initial:
    """What an adapter began with, and what its layer's weight therefore lacks: scale * up @ down."""

    down: Tensor
    """(rank, in)."""
    up: Tensor
    """(out, rank)."""
    scale: float
    original: Tensor
    """The untouched weight of the layer, on the CPU: in half precision, sums would not give it back."""

    def of(self, weight: Tensor) -> Tensor:
        """In the shape of the layer's weight, fp32."""
        return (self.scale * self.up @ self.down).to(weight.device).view(weight.shape)


def begin(layer: LoraLayer, init: Literal["pissa", "olora"], adapter: str) -> None:
    """Start a fresh adapter at the largest directions of its layer; convolutions start at zero, as ever."""
    base = cast(Any, layer.get_base_layer())
    if not isinstance(base, nn.Linear):
        return
    if base.weight.device.type == "meta":  # only to be counted
        down, up = (cast(Any, side[adapter]).weight.detach() for side in (layer.lora_A, layer.lora_B))
        _keep(layer, Initial(down.clone(), up.clone(), float(layer.scaling[adapter]), base.weight.detach()))
        return
    weight = base.weight.data
    if init == "pissa":
        layer.pissa_init(adapter, _PISSA)
    else:
        base.weight.data = weight.clone()  # it is changed in place
        layer.olora_init(adapter)
    for side in (layer.lora_A, layer.lora_B):
        matrix = cast(Any, side[adapter]).weight
        matrix.data = matrix.data.float().to(weight.device).contiguous()
    down, up = (cast(Any, side[adapter]).weight.detach().clone() for side in (layer.lora_A, layer.lora_B))
    _keep(layer, Initial(down, up, float(layer.scaling[adapter]), weight.cpu().clone()))


def initial_of(layer: Any) -> Initial | None:
    """What the layer's weight lacks; None for all other adapters."""
    return getattr(layer, "_initial", None)


def restart(layer: Any, down: Tensor, up: Tensor) -> None:
    """Begin at saved factors in place of those found here: another computer may have found others."""
    own = initial_of(layer)
    assert own is not None
    _keep(layer, replace(own, down=down.to(own.down.device), up=up.to(own.up.device)))


def _keep(layer: Any, initial: Initial) -> None:
    """Remember what an adapter begins with, and take it out of the layer's weight."""
    layer._initial = initial
    weight = layer.get_base_layer().weight
    original = initial.original.to(weight.device)
    weight.data = (original.float() - initial.of(original)).to(original.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# at another LoRA


def continue_from(layers: Mapping[str, Any], deltas: Sequence[Delta], adapter: str, where: str) -> None:
    """Give fresh adapters of one component the changes of another LoRA; where it has none, they begin as ever.

    A smaller rank than the adapter's leaves room to learn: the rest of `up` is zero.

    Raises:
        ConfigError: if a change has no adapter here, has a larger rank, or is no plain LoRA.
    """
    problems = []
    for delta in deltas:
        layer = layers.get(delta.name)
        if delta.form == "lora" and not delta.up.any():
            continue
        if delta.form != "lora" or "lora_mid.weight" in delta.tensors:
            fix = f"Make a plain LoRA of it first: lorasmith resize {where} --rank {delta.rank or 16} --out FILE"
            problems.append(Problem("adapter.start_from", f"{delta.name} is a {delta.form}, not a plain LoRA", fix))
        elif layer is None:
            fix = "Take larger adapter.targets, or leave train_only empty."
            problems.append(Problem("adapter.start_from", f"{delta.name} is not among what is trained", fix))
        elif delta.rank > layer.r[adapter]:
            what = f"its rank, {delta.rank}, is larger than {layer.r[adapter]}, that of the adapter"
            problems.append(Problem("adapter.start_from", f"{delta.name}: {what}", f"Set adapter.rank = {delta.rank}."))
        else:
            _take_over(layer, delta, adapter)
    if problems:
        raise ConfigError.of(problems[:_SHOWN])


_SHOWN = 5


@torch.no_grad()
def _take_over(layer: Any, delta: Delta, adapter: str) -> None:
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if down.device.type == "meta":
        return
    share = delta.scale / layer.scaling[adapter]
    down[: delta.rank] = delta.down.view(delta.rank, *down.shape[1:]).to(down)
    up[:, : delta.rank] = share * delta.up.view(up.shape[0], delta.rank, *up.shape[2:]).to(up)


# ---------------------------------------------------------------------------------------------------------------------
# at the directions of the data


def look_at_data(
    layers: Mapping[str, Any], batches: Sequence[Any], forward: Callable[[Any], Any], adapter: str, progress: Progress
) -> list[str]:
    """EVA (Paischer et al. 2024): let linear layers' adapters read along the main directions of what the layers read.

    `layers` holds the adapted layers by name. Returns the names of those that stay as they were: convolutions, and
    layers that read fewer vectors in a batch, or narrower ones, than their rank, so that the directions are not known.
    """
    readers = _readers(layers, lambda: forward(batches[0]), adapter)
    components: dict[str, IncrementalPCA] = {
        first: IncrementalPCA(rank, lowrank=True, lowrank_seed=0) for first, (rank, _) in readers.items()
    }

    def learn(name: str, read: tuple[Tensor, ...]) -> None:
        vectors = read[0].detach().float().flatten(0, -2)
        if len(vectors) >= readers[name][0]:  # a last batch may be smaller
            components[name].partial_fit(vectors)

    with _watched({first: layers[first] for first in readers}, learn):
        for number, batch in enumerate(batches):
            forward(batch)
            progress(number + 1, len(batches))
    for first, (_, names) in readers.items():
        for name in names:
            weight = layers[name].lora_A[adapter].weight
            weight.data.copy_(components[first].components_[: len(weight)].to(weight))
    turned = {name for _, names in readers.values() for name in names}
    return [name for name in layers if name not in turned]


def _readers(layers: Mapping[str, Any], forward: Callable[[], Any], adapter: str) -> dict[str, tuple[int, list[str]]]:
    """Layers that read the same, such as queries, keys and values, by the first: (largest rank, names)."""
    reads: dict[str, Tensor] = {}

    def note(name: str, read: tuple[Tensor, ...]) -> None:
        reads[name] = read[0]

    with _watched({name: layer for name, layer in layers.items() if isinstance(layer.base_layer, nn.Linear)}, note):
        forward()
    found: dict[int, tuple[int, list[str]]] = {}
    for name, read in reads.items():
        rank = layers[name].r[adapter]
        if rank <= min(read.shape[-1], read[..., 0].numel()):
            largest, names = found.get(id(read), (0, []))
            found[id(read)] = (max(largest, rank), [*names, name])
    return {names[0]: (rank, names) for rank, names in found.values()}


@contextmanager
def _watched(layers: Mapping[str, Any], look: Callable[[str, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Within the block `look` is told what each layer reads, with its name, before it does."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, read, name=name: look(name, read)) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

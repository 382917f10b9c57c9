"""Where adapters begin, if not at zero: at the base's largest directions, at those of the data, or at another LoRA.

PiSSA and OLoRA take the base's largest directions out of its weight. What is taken out is kept here, because the change
relative to the untouched base, which is what files and strengths are about, is the adapter's product minus that of its
first factors. EVA turns only the matrix that reads, so that the change is still zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

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
        _keep(layer, Initial(down.clone(), up.clone(), float(layer.scaling[adapter])))
        return
    weight = base.weight.data
    if init == "pissa":
        layer.pissa_init(adapter, _PISSA)
    else:
        base.weight.data = weight.clone()  # it is changed in place
        layer.olora_init(adapter)
    base.weight.data = weight
    for side in (layer.lora_A, layer.lora_B):
        matrix = cast(Any, side[adapter]).weight
        matrix.data = matrix.data.float().to(weight.device).contiguous()
    down, up = (cast(Any, side[adapter]).weight.detach().clone() for side in (layer.lora_A, layer.lora_B))
    initial = Initial(down, up, float(layer.scaling[adapter]))
    _keep(layer, initial)
    _add(base, -1, initial)


def initial_of(layer: Any) -> Initial | None:
    """What the layer's weight lacks; None for all other adapters."""
    return getattr(layer, "_initial", None)


def restart(layer: Any, saved: Initial) -> None:
    """Begin at saved factors in place of those found here: another computer may have found others."""
    own = initial_of(layer)
    assert own is not None
    if torch.equal(own.down.cpu(), saved.down) and torch.equal(own.up.cpu(), saved.up):
        return
    base, device = layer.get_base_layer(), own.down.device
    saved = Initial(saved.down.to(device), saved.up.to(device), saved.scale)
    _add(base, 1, own)
    _add(base, -1, saved)
    _keep(layer, saved)


def _keep(layer: Any, initial: Initial) -> None:
    layer._initial = initial


def _add(base: Any, sign: int, initial: Initial) -> None:
    weight = base.weight.data
    base.weight.data = (weight.float() + sign * initial.of(weight)).to(weight.dtype)


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
        if delta.form != "lora" or "lora_mid.weight" in delta.tensors:
            fix = f"Make a plain LoRA of it first: lorasmith bake {where} --rank {delta.rank or 16}"
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
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Sequence[Any],
    forward: Callable[[Any, Any], Any],
    adapter: str,
) -> list[str]:
    """EVA (Paischer et al. 2024): let linear layers' adapters read along the main directions of what the layers read.

    `layers` holds the adapted layers by their paths in `model`. Returns the paths of those that stay as they were:
    convolutions, and layers that read fewer rows in a batch than their rank, so that their directions are not known.
    """
    rows = _rows_read(layers, lambda: forward(model, batches[0]))
    turned = {f"{name}.base_layer": layers[name] for name, count in rows.items() if count >= layers[name].r[adapter]}
    ranks = {name: layer.r[adapter] for name, layer in turned.items()}
    if not ranks:
        return list(layers)
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items()},
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),  # every layer keeps its rank
    )
    directions = get_eva_state_dict(
        model,
        [_Batch(inputs) for inputs in batches],
        peft_config=config,
        forward_fn=lambda model, batch: forward(model, batch.inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda read, *_: read[0].float().flatten(0, -2),
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    for name, vectors in directions.items():
        weight = turned[name].lora_A[adapter].weight
        weight.data.copy_(vectors.to(weight))
    return [name for name in layers if f"{name}.base_layer" not in directions]


def _rows_read(layers: Mapping[str, Any], forward: Callable[[], Any]) -> dict[str, int]:
    """How many vectors each linear layer reads in one forward pass."""
    rows: dict[str, int] = {}

    def count(name: str, read: tuple[Tensor, ...]) -> None:
        rows[name] = read[0].flatten(0, -2).shape[0]

    linear = {name: layer.base_layer for name, layer in layers.items() if isinstance(layer.base_layer, nn.Linear)}
    hooks = [layer.register_forward_pre_hook(lambda _, read, n=name: count(n, read)) for name, layer in linear.items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


@dataclass
class _Batch:
    """PEFT moves and copies what it is given; this is moved already."""

    inputs: Any

    def to(self, device: Any) -> _Batch:
        del device
        return self

    def __deepcopy__(self, memo: Any) -> _Batch:
        del memo
        return self

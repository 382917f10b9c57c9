"""A live adapter: what it changes in each layer, how strongly it acts, and its weights as a checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .delta import Changes, Delta
from .errors import TrainingError, UserError
from .full import interpolated, trained_weights
from .initial import Initial, initial_of, restart
from .models import Base
from .pivotal import NEW_TOKENS, token_embeddings, unread
from .strengths import Strengths

ADAPTER = "default"


# ---------------------------------------------------------------------------------------------------------------------
# what it changes


def tuner_layers(component: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The adapted layers of one component, by their dotted paths."""
    for name, layer in component.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer


def has_adapters(component: nn.Module) -> bool:
    return next(tuner_layers(component), None) is not None


def scale_of(layer: BaseTunerLayer) -> float | None:
    """What the layer's change is multiplied with, alpha / rank at strength 1; None for rotations, which have none."""
    return float(layer.scaling[ADAPTER]) if isinstance(layer, LoraLayer | LycorisLayer) else None


def deltas(component: nn.Module) -> Iterator[Delta]:
    """What the adapters change in the layers of one component, read live, at the scale they really apply."""
    return (delta_of(name, layer) for name, layer in tuner_layers(component))


def delta_of(name: str, layer: BaseTunerLayer) -> Delta:
    """What the adapter of one layer changes."""
    if isinstance(layer, LoraLayer):
        return _delta_of_lora(name, layer)
    if isinstance(layer, LycorisLayer):
        return _delta_of_lycoris(name, layer)
    return Delta(name, {"diff": _rotated(layer) - _weight(layer).float()}, 0.0)


def base_weight(component: nn.Module, name: str) -> Tensor:
    """The weight of an adapted layer as the untouched base has it, (out, in[, kh, kw])."""
    layer = component.get_submodule(name)
    assert isinstance(layer, BaseTunerLayer), name
    return _original(layer)


def _original(layer: BaseTunerLayer) -> Tensor:
    initial, weight = initial_of(layer), _weight(layer)
    return weight if initial is None else initial.original.to(weight.device)


def _delta_of_lora(name: str, layer: LoraLayer) -> Delta:
    down, up = (cast(Any, side[ADAPTER]).weight.detach() for side in (layer.lora_A, layer.lora_B))
    scale, initial = float(layer.scaling[ADAPTER]), initial_of(layer)
    if initial is not None:  # the base's weight lacks what the adapter began with
        share = initial.scale / scale if scale else 0.0
        down, up = torch.cat([down, initial.down]), torch.cat([up, -share * initial.up], 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    if ADAPTER in layer.lora_magnitude_vector:
        lengths = cast(Any, layer.lora_magnitude_vector[ADAPTER]).weight.detach()
        tensors["dora_scale"] = lengths.view(-1, *[1] * (_weight(layer).dim() - 1))
    return Delta(name, tensors, scale * down.shape[0])


def _delta_of_lycoris(name: str, layer: LycorisLayer) -> Delta:
    """PEFT scales a Kronecker product of two whole factors as well, where all clients leave it as it is."""
    tensors = {n: cast(Any, getattr(layer, n))[ADAPTER].detach() for n in _parameters_of(layer)}
    scale = float(layer.scaling[ADAPTER])
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return Delta(name, tensors | {"lokr_w2": scale * tensors["lokr_w2"]}, 1.0)
    return Delta(name, tensors, scale * layer.r[ADAPTER])


def _parameters_of(layer: LycorisLayer) -> list[str]:
    """Of all matrices that such a layer may have, those that it has."""
    return [name for name in layer.adapter_layer_names if ADAPTER in getattr(layer, name)]


def _weight(layer: BaseTunerLayer) -> Tensor:
    return cast(Tensor, layer.get_base_layer().weight).detach()


def _rotated(layer: BaseTunerLayer) -> Tensor:
    """The weight with the rotation in it, fp32; the layer is left as it was."""
    base = layer.get_base_layer()
    kept = cast(Any, base.weight).data
    base.weight.data = kept.float().clone()
    try:
        cast(Any, layer).merge()
        return base.weight.data.clone()
    finally:
        base.weight.data = kept
        layer.merged_adapters.clear()


# ---------------------------------------------------------------------------------------------------------------------
# its strength


@contextmanager
def strength(base: Base, at: float | Strengths) -> Iterator[None]:
    """Within the block what was trained acts at these strengths; 0 is the untouched base. Then all is as it was before.

    New tokens are read or not, with nothing between: they are unless their text encoders' strength is 0.

    Raises:
        ConfigError: if a block that is named holds nothing of what was trained.
        UserError: if one of two text encoders would read new tokens, and the other not.
    """
    strengths = at if isinstance(at, Strengths) else Strengths(at)
    strengths.refuse_idle(trained_layers(base))
    with nullcontext() if reads_tokens(base, strengths) else unread(base):
        if any(map(has_adapters, base.components.values())):
            with _adapters_at(base, strengths):
                yield
        else:
            with interpolated(base, strengths):
                yield


def trained_layers(base: Base) -> Iterator[tuple[str, str]]:
    """What a strength can be given to, as (component, path): adapted layers, else weights of the base; new tokens."""
    for component, module in base.components.items():
        adapted = [name for name, _ in tuner_layers(module)]
        own = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        yield from ((component, name) for name in adapted)
        yield from ((component, name) for name in own if not adapted or name.endswith(NEW_TOKENS))


def reads_tokens(base: Base, strengths: Strengths) -> bool:
    """Whether the trigger is read as its new tokens, where there are such.

    Raises:
        UserError: if one of two text encoders would do so, and the other not.
    """
    read = {name: strengths.of(name, f"embeddings{NEW_TOKENS}") != 0 for name in token_embeddings(base)}
    if len(set(read.values())) > 1:
        what = "the new tokens of the trigger are read by both text encoders or by none"
        raise UserError(what, "--block", "Give text_encoder and text_encoder_2 strength 0, or neither.")
    return any(read.values())


@contextmanager
def _adapters_at(base: Base, strengths: Strengths) -> Iterator[None]:
    moved = [
        (layer, factor)
        for component, module in base.components.items()
        for name, layer in tuner_layers(module)
        if (factor := strengths.of(component, name)) != 1
    ]
    linear = [(layer, factor) for layer, factor in moved if _is_linear(layer)]
    others = [(layer, factor) for layer, factor in moved if not _is_linear(layer)]
    with _scaled(linear), _replaced(others):
        yield


def _is_linear(layer: BaseTunerLayer) -> bool:
    """Whether its effect is in proportion to its scale."""
    is_dora = isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector
    return scale_of(layer) is not None and not is_dora and initial_of(layer) is None


@contextmanager
def _scaled(layers: Sequence[tuple[Any, float]]) -> Iterator[None]:
    trained = [dict(layer.scaling) for layer, _ in layers]
    for layer, factor in layers:
        layer.scaling = {name: value * factor for name, value in layer.scaling.items()}
    try:
        yield
    finally:
        for (layer, _), scaling in zip(layers, trained, strict=True):
            layer.scaling = scaling


@contextmanager
def _replaced(layers: Sequence[tuple[Any, float]]) -> Iterator[None]:
    """The adapters are switched off, and a share of their change stands in the weights; put back bit by bit."""
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer, factor in layers:
                weight, original = _weight(layer), _original(layer)
                kept.append((layer, weight.cpu().clone()))
                change = factor * delta_of("", layer).of(original) if factor else 0.0
                weight.copy_(original.float() + change)
                layer.enable_adapters(False)
        yield
    finally:
        for layer, weight in kept:
            _weight(layer).copy_(weight)
            layer.enable_adapters(True)


@torch.no_grad()
def settle(base: Base, changes: Changes) -> None:
    """Let other changes than the adapters' stand in the weights, for good; the adapters are switched off.

    The base then acts as these changes say, at strength 1 alone, and refuses to be exported as what its adapters are.
    """
    for component, module in base.components.items():
        for _, layer in tuner_layers(module):
            _weight(layer).copy_(_original(layer))
            layer.enable_adapters(False)
        for delta in changes.get(component, ()):
            layer: Any = module.get_submodule(delta.name)
            weight = _weight(layer) if isinstance(layer, BaseTunerLayer) else layer.weight
            weight.copy_(weight.float() + delta.of(weight))


def let_drop(base: Base, drop: bool) -> None:
    """Switch the adapters' dropout, which draws from torch's own generator; the base's layers have none."""
    for component in base.components.values():
        for _, layer in tuner_layers(component):
            cast(nn.Module, layer).train(drop)


# ---------------------------------------------------------------------------------------------------------------------
# its weights


def adapter_state(base: Base) -> dict[str, Tensor]:
    """All that is trained, by component and the library's name, as fp32 copies on the CPU.

    Where the base's weights lack what an adapter began with, that is here as well.
    """
    weights = {name: parameter.detach() for name, parameter in trained_weights(base).items()}
    return {name: tensor.float().cpu().contiguous().clone() for name, tensor in (weights | _initials(base)).items()}


def load_adapter_state(base: Base, state: dict[str, Tensor]) -> None:
    """Copy saved weights into what `put_on` prepared.

    Raises:
        TrainingError: if the saved weights are not those of this configuration.
    """
    live = {name: parameter.detach() for name, parameter in trained_weights(base).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in (live | _initials(base)).items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise TrainingError(
            "the saved weights do not fit this base and configuration",
            "checkpoint",
            "Use the config.toml and the base that the run was started with.",
        )
    for name, layer in _begun(base):
        restart(layer, state[f"{name}.initial_down"], state[f"{name}.initial_up"])
    for name, tensor in live.items():
        tensor.copy_(state[name])


def _initials(base: Base) -> dict[str, Tensor]:
    return {
        f"{name}.initial_{side}": getattr(_initial(layer), side)
        for name, layer in _begun(base)
        for side in ("down", "up")
    }


def _begun(base: Base) -> Iterator[tuple[str, Any]]:
    """Layers whose base weight lacks what their adapter began with."""
    for component, module in base.components.items():
        for name, layer in tuner_layers(module):
            if initial_of(layer) is not None:
                yield f"{component}.{name}", layer


def _initial(layer: Any) -> Initial:
    initial = initial_of(layer)
    assert initial is not None
    return initial

"""What is trained, LoRA adapters (PEFT) or the base's own weights: put it on, group it, read it, set its strength."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .config import AdapterSection, RunConfig, Targets
from .errors import ConfigError, TrainingError
from .full import interpolated, trained_weights, unfreeze
from .models import Base

ADAPTER = "default"

_UNET_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_UNET_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
_UNET_CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
UNET_TARGETS: dict[Targets, list[str]] = {
    "attention": _UNET_ATTENTION,
    "attention+ff": _UNET_ATTENTION + _UNET_FEED_FORWARD,
    "attention+ff+conv": _UNET_ATTENTION + _UNET_FEED_FORWARD + _UNET_CONVOLUTION,
}

# All four of q, k, v and out: A1111 ignores the attention of OpenCLIP text encoders unless all four are there.
_TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_TARGETS: dict[Targets, list[str]] = {
    "attention": _TEXT_ATTENTION,
    "attention+ff": [*_TEXT_ATTENTION, "fc1", "fc2"],
    "attention+ff+conv": [*_TEXT_ATTENTION, "fc1", "fc2"],
}


@dataclass(frozen=True)
class Part:
    """One trained component, as it is printed and recorded."""

    name: str
    modules: int
    parameters: int
    lr: float


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its weight changes by `alpha / rank * up @ down`."""

    name: str
    """Dotted path of the layer inside its component."""
    down: Tensor
    """(rank, in) or (rank, in, kh, kw)."""
    up: Tensor
    """(out, rank) or (out, rank, 1, 1)."""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def trained_components(base: Base, settings: AdapterSection) -> dict[str, Any]:
    """The components that are trained."""
    return {
        name: module
        for name, module in base.components.items()
        if (settings.unet if name == "unet" else settings.text_encoder)
    }


def put_on(base: Base, settings: AdapterSection, seed: int) -> None:
    """Add fp32 LoRA layers to the trained components of a frozen base, or unfreeze their own weights; no effect yet.

    Raises:
        ConfigError: if `adapter.train_only` names a block that is not there.
    """
    if settings.kind == "full":
        unfreeze(base, trained_components(base, settings), settings.train_only)
        return
    for offset, (name, module) in enumerate(trained_components(base, settings).items()):
        targets = UNET_TARGETS if name == "unet" else TEXT_TARGETS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + offset)
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # a float is fine
                target_modules=targets[settings.targets],
                exclude_modules=base.family.unread_layers(name, module),
            )
            module.add_adapter(config, adapter_name=ADAPTER)
        for parameter in trained_parameters(module):
            parameter.data = parameter.data.float()


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained in one component, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def learning_rate(config: RunConfig, component: str) -> float:
    return config.optimizer.lr if component == "unet" else config.optimizer.text_encoder_lr


def parts(base: Base, config: RunConfig) -> list[Part]:
    """What is trained: modules, parameters and learning rate of each part, counted on the live model.

    Raises:
        ConfigError: if a part that should be trained holds nothing that is.
    """
    found, trains = [], {n: trained_parameters(m) for n, m in trained_components(base, config.adapter).items()}
    for name, module in trained_components(base, config.adapter).items():
        parameters = trains[name]
        alike = [other for other in trains if (other == "unet") == (name == "unet")]
        if not any(trains[other] for other in alike):
            full = config.adapter.kind == "full"
            raise ConfigError(
                f"no {'block' if full else 'layer'} of {name} is among those that are to be trained",
                "adapter.train_only" if full else "adapter.targets",
                f"Name one, or set adapter.{'unet' if name == 'unet' else 'text_encoder'} = false.",
            )
        if not parameters:  # of two text encoders, one may be trained alone
            continue
        size = sum(parameter.numel() for parameter in parameters)
        found.append(Part(name, len(list(_trained_modules(module))), size, learning_rate(config, name)))
    return found


def parameter_groups(base: Base, config: RunConfig) -> list[dict]:
    """One optimizer group per part, each with its learning rate."""
    return [
        {"params": trained_parameters(module), "lr": learning_rate(config, name), "name": name}
        for name, module in trained_components(base, config.adapter).items()
        if trained_parameters(module)
    ]


def _trained_modules(component: nn.Module) -> Iterator[Any]:
    """The adapted layers; where there are none, those whose own weights are trained."""
    own = (m for m in component.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return lora_modules(component) if has_adapters(component) else own


def has_adapters(component: nn.Module) -> bool:
    return next(lora_modules(component), None) is not None


def lora_modules(component: nn.Module) -> Iterator[LoraModule]:
    """The adapted layers of one component, read from the live model; alpha is what the layer really applies."""
    for name, layer in component.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.scaling:
            down, up = cast(Any, layer.lora_A[ADAPTER]), cast(Any, layer.lora_B[ADAPTER])
            yield LoraModule(
                name=name,
                down=down.weight.detach(),
                up=up.weight.detach(),
                alpha=float(layer.scaling[ADAPTER] * layer.r[ADAPTER]),
            )


def adapter_state(base: Base) -> dict[str, Tensor]:
    """All that is trained, as fp32 copies on the CPU.

    Adapters are `unet.<layer>.down`, `text_encoder.<layer>.up`, ...; the base's own weights have diffusers' names.
    """
    return {name: tensor.float().cpu().clone() for name, tensor in _live_weights(base).items()}


def load_adapter_state(base: Base, state: dict[str, Tensor]) -> None:
    """Copy saved weights into what `put_on` prepared.

    Raises:
        TrainingError: if the saved weights are not those of this configuration.
    """
    live = _live_weights(base)
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise TrainingError(
            "the saved weights do not fit this base and configuration",
            "checkpoint",
            "Use the config.toml and the base that the run was started with.",
        )
    for name, tensor in live.items():
        tensor.copy_(state[name])


def _live_weights(base: Base) -> dict[str, Tensor]:
    adapters = {
        f"{component}.{lora.name}.{side}": getattr(lora, side)
        for component, module in base.components.items()
        for lora in lora_modules(module)
        for side in ("down", "up")
    }
    return adapters or {name: parameter.detach() for name, parameter in trained_weights(base).items()}


@contextmanager
def strength(base: Base, factor: float) -> Iterator[None]:
    """Within the block what was trained acts with `factor` times its effect; 0 is the untouched base."""
    if not any(map(has_adapters, base.components.values())):
        with interpolated(base, factor) if factor != 1 and trained_weights(base) else nullcontext():
            yield
        return
    layers = [m for c in base.components.values() for m in c.modules() if isinstance(m, LoraLayer)]
    trained = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = {name: value * factor for name, value in layer.scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, trained, strict=True):
            layer.scaling = scaling

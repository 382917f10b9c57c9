"""Put on what is trained, adapters (PEFT) or the base's own weights, and sort it by learning rate."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .adapter import ADAPTER, has_adapters, let_drop, scale_of, tuner_layers
from .config import AdapterSection, BlockSection, RunConfig
from .delta import Delta
from .errors import ConfigError
from .full import trained_weights, unfreeze
from .initial import begin, continue_from
from .loraread import read_lora
from .models import Base
from .paths import blocks, lies_in, path_of, refuse_idle
from .pivotal import NEW_TOKENS, add_tokens
from .targets import Layer, layers_of

TOKENS = "new tokens"


@dataclass(frozen=True)
class Part:
    """One trained component, as it is printed and recorded."""

    name: str
    modules: int
    parameters: int
    lr: float
    effective_lr: list[float] = field(default_factory=list)
    """Smallest and largest learning rate x alpha / rank of its layers; empty where there is no such scale."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Parameters by block."""


# ---------------------------------------------------------------------------------------------------------------------
# putting it on


def trained_components(base: Base, settings: AdapterSection) -> dict[str, Any]:
    """The components that are trained."""
    return {
        name: module
        for name, module in base.components.items()
        if (settings.unet if name == "unet" else settings.text_encoder)
    }


def put_on(
    base: Base,
    settings: AdapterSection,
    seed: int,
    blocks: Sequence[BlockSection] = (),
    trigger: str = "",
    start: Mapping[str, Sequence[Delta]] | None = None,
) -> None:
    """Add fp32 adapters to the trained components of a frozen base, or unfreeze their own weights.

    There is no effect yet, unless `start` holds changes to begin with, by component.

    Raises:
        ConfigError: if a named block is not there, or a layer cannot take such an adapter.
    """
    components = trained_components(base, settings)
    if settings.kind == "full":
        unfreeze(base, components, settings.train_only)
        return
    layers = layers_of(base, components, settings, blocks)
    for offset, (name, module) in enumerate(components.items()):
        if layers[name]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + offset)
                _inject(module, name, layers[name], settings)
    for name, changes in (start or {}).items():
        if name not in components:
            fix = f"Set adapter.{'unet' if name == 'unet' else 'text_encoder'} = true."
            raise ConfigError(f"holds changes of {name}, which is not trained", "adapter.start_from", fix)
        unread = base.family.unread_layers(name, base.components[name])
        read = [change for change in changes if not (unread and re.fullmatch(unread, change.name))]
        continue_from(dict(tuner_layers(base.components[name])), read, ADAPTER, settings.start_from)
    if settings.new_tokens:
        add_tokens(base, trigger, settings.new_tokens, settings.token_init)
    let_drop(base, False)


def read_start(settings: AdapterSection, base: Base) -> dict[str, list[Delta]]:
    """The changes that the adapter starts with, by component, read for a base that carries none yet.

    Raises:
        UserError: if the file of `adapter.start_from` is not a LoRA of this base.
    """
    if not settings.start_from:
        return {}
    return read_lora(Path(settings.start_from).expanduser(), base.components, base.info.family)


def _inject(module: Any, component: str, layers: Sequence[Layer], settings: AdapterSection) -> None:
    config = _peft_config(module, component, layers, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA extension.*|.*butterfly.*")  # BOFT's fast path is optional
        inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=module.device.type == "meta")
    for parameter in trained_parameters(module):
        parameter.data = parameter.data.float()
    for _, layer in tuner_layers(module) if settings.kind == "dora" else ():
        _measure_exactly(cast(LoraLayer, layer))
    for _, layer in tuner_layers(module) if settings.init in ("pissa", "olora") else ():
        begin(cast(LoraLayer, layer), cast(Literal["pissa", "olora"], settings.init), ADAPTER)


def _measure_exactly(layer: LoraLayer) -> None:
    """The lengths of a DoRA in fp32: in the base's half precision they would change it before it has learned."""
    lengths, weight = cast(Any, layer.lora_magnitude_vector[ADAPTER]).weight, layer.get_base_layer().weight
    if weight.device.type != "meta":
        lengths.data = cast(Tensor, weight).float().flatten(1).norm(dim=1).view(lengths.shape)


def _peft_config(module: Any, component: str, layers: Sequence[Layer], settings: AdapterSection) -> PeftConfig:
    """One configuration for all layers of a component; where their ranks and alphas differ, by name."""
    common: dict[str, Any] = {"target_modules": "|".join(re.escape(layer.name) for layer in layers)}
    if settings.kind in ("oft", "boft"):
        _require_blocks(module, component, layers, settings.block_size)
        if settings.kind == "oft":
            return OFTConfig(r=0, oft_block_size=settings.block_size, module_dropout=settings.module_dropout, **common)
        return BOFTConfig(
            boft_block_size=settings.block_size, boft_block_num=0, boft_dropout=settings.module_dropout, **common
        )
    common |= {
        "r": settings.rank,
        "rank_pattern": _pattern({layer.name: layer.rank for layer in layers if layer.rank != settings.rank}),
        "alpha_pattern": _pattern({layer.name: layer.alpha for layer in layers if layer.alpha != settings.alpha}),
    }
    if settings.kind in ("lora", "dora"):
        return LoraConfig(
            lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # a float is fine
            lora_dropout=settings.dropout,
            use_rslora=settings.rslora,
            use_dora=settings.kind == "dora",
            init_lora_weights="gaussian" if settings.init == "gaussian" else True,
            **common,
        )
    common |= {
        "alpha": settings.alpha,
        "rank_dropout": settings.rank_dropout,
        "module_dropout": settings.module_dropout,
    }
    if settings.kind == "loha":
        return LoHaConfig(**common)
    return LoKrConfig(decompose_factor=settings.decompose_factor, **common)


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by layer to values by pattern, as PEFT takes them; one for each value, for it tries all on every layer."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {f"^(?:{'|'.join(alike)})$": value for value, alike in names.items()}


def _require_blocks(module: nn.Module, component: str, layers: Sequence[Layer], size: int) -> None:
    """Rotations work on whole blocks of what a layer reads; PEFT would take another size without being asked."""
    for layer in layers:
        inputs = cast(Tensor, module.get_submodule(layer.name).weight)[0].numel()
        if inputs % size:
            fits = next(other for other in range(min(size, inputs), 0, -1) if inputs % other == 0)
            raise ConfigError(
                f"{size} does not divide the {inputs} inputs of {path_of(component, layer.name)}",
                "adapter.block_size",
                f"Set adapter.block_size = {fits}, or leave that layer out with adapter.targets or train_only.",
            )


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and how fast


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained in one component, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def rate_of(config: RunConfig, path: str) -> tuple[str, float]:
    """The group and the learning rate of a trained weight, by its path with its component's name in front."""
    optimizer, component = config.optimizer, path.partition(".")[0]
    if path.endswith(NEW_TOKENS):
        return TOKENS, optimizer.token_lr
    group, lr = component, optimizer.lr if component == "unet" else optimizer.text_encoder_lr
    for block in config.block:
        if block.lr and lies_in(path, block.path):
            group, lr = block.path, block.lr
    if optimizer.loraplus_ratio != 1 and ".lora_B." in path:
        return f"{group} up", lr * optimizer.loraplus_ratio
    return group, lr


def parameter_groups(base: Base, config: RunConfig) -> list[dict]:
    """Optimizer groups: one per part, and one more for each learning rate that differs inside it."""
    groups: dict[str, dict] = {}
    for path, parameter in _trained(base).items():
        name, lr = rate_of(config, path)
        groups.setdefault(name, {"params": [], "lr": lr, "name": name})["params"].append(parameter)
    return list(groups.values())


def parts(base: Base, config: RunConfig) -> list[Part]:
    """What is trained: modules, parameters and learning rate of each part, counted on the live model.

    Raises:
        ConfigError: if a part that should be trained holds nothing that is, or a `[[block]]` names none of it.
    """
    trained = _trained(base)
    refuse_idle("block.{}.path", [block.path for block in config.block], list(trained))
    found = []
    for name, module in trained_components(base, config.adapter).items():
        own = {path: p for path, p in trained.items() if path.startswith(f"{name}.") and not path.endswith(NEW_TOKENS)}
        if own:
            found.append(_part(name, module, own, config))
        elif name == "unet" or not any(p.startswith("text_encoder") and not p.endswith(NEW_TOKENS) for p in trained):
            raise _nothing_trained(name, config)  # of two text encoders, one may be trained alone
    if tokens := [parameter for path, parameter in trained.items() if path.endswith(NEW_TOKENS)]:
        found.append(Part(TOKENS, len(tokens), sum(p.numel() for p in tokens), config.optimizer.token_lr))
    return found


def _trained(base: Base) -> dict[str, nn.Parameter]:
    """All that is trained, by its path."""
    return {path_of(*name.split(".", 1)): parameter for name, parameter in trained_weights(base).items()}


def _part(name: str, module: Any, own: dict[str, nn.Parameter], config: RunConfig) -> Part:
    sizes: dict[str, int] = {}
    for path, parameter in own.items():
        [block] = blocks([path])
        sizes[block] = sizes.get(block, 0) + parameter.numel()
    scaled = ((rate_of(config, path_of(name, layer))[1], scale_of(tuner)) for layer, tuner in tuner_layers(module))
    effective = [lr * scale for lr, scale in scaled if scale is not None]
    return Part(
        name=name,
        modules=len(list(_trained_modules(module))),
        parameters=sum(sizes.values()),
        lr=config.optimizer.lr if name == "unet" else config.optimizer.text_encoder_lr,
        effective_lr=[min(effective), max(effective)] if effective else [],
        blocks=sizes,
    )


def _nothing_trained(component: str, config: RunConfig) -> ConfigError:
    full = config.adapter.kind == "full"
    return ConfigError(
        f"no {'block' if full else 'layer'} of {component} is among those that are to be trained",
        "adapter.train_only" if config.adapter.train_only else "adapter.targets",
        f"Name one, or set adapter.{'unet' if component == 'unet' else 'text_encoder'} = false.",
    )


def _trained_modules(component: nn.Module) -> Iterator[Any]:
    """The adapted layers; where there are none, those whose own weights are trained."""
    own = (m for m in component.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return tuner_layers(component) if has_adapters(component) else own

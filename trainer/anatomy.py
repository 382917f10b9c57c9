"""The shape of a base without its weights, on PyTorch's meta device: what will be trained is counted on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from .architectures import ARCHITECTURES
from .bases import NO_MODEL, POCKET, BaseInfo, require_modest
from .config import RunConfig
from .errors import BaseModelError, first_line
from .fitting import Part, parts, put_on, read_start
from .loraread import read_lora
from .models import FAMILIES, Base
from .singlefile import read_single_file


def foreseen_parts(info: BaseInfo, config: RunConfig, afresh: bool = True) -> list[Part]:
    """What a run will train, counted before anything is loaded; raises as `foreseen_base`."""
    return parts(foreseen_base(info, config, afresh), config)


def foreseen_base(info: BaseInfo, config: RunConfig, afresh: bool = True) -> Base:
    """The shape of a base with what a run trains of it; one that goes on needs not what it started from.

    Raises:
        ConfigError: for blocks that are not there, layers that cannot take the adapter, and parts that hold nothing.
        UserError: if a LoRA to start from, or to merge, does not fit.
    """
    base, adapter = skeleton(info), config.adapter
    for file, _ in info.merges:
        read_lora(Path(file), base.components, info.family)
    start = read_start(adapter, base) if afresh else {}
    put_on(base, adapter, config.seed, config.block, config.trigger, start)
    return base


def skeleton(info: BaseInfo) -> Base:
    """A base whose UNet and text encoders have shapes only; it has no VAE.

    Raises:
        BaseModelError: if a configuration makes no model.
    """
    encoders, configs = FAMILIES[info.family].text_encoder_classes, _configs(info)
    try:
        for config in (configs["unet"], *(configs[name] for name in encoders)):
            require_modest(config)
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(configs["unet"])
            text = {name: kind(CLIPTextConfig.from_dict(configs[name])) for name, kind in encoders.items()}
    except NO_MODEL as error:
        what = f"a configuration of {info.model} makes no model: {first_line(error)}"
        raise BaseModelError(what, "base.model", "Save or download it again.") from error
    base = Base(info, [_tokenizer()] * len(text), text, vae=None, unet=unet, scheduler=DDIMScheduler())
    for module in base.components.values():
        module.requires_grad_(False).eval()
    return base


@cache
def _tokenizer() -> CLIPTokenizer:
    """CLIP's own, for all skeletons: reading it takes longer than all else."""
    return CLIPTokenizer.from_pretrained(POCKET / "tokenizer")


def _configs(info: BaseInfo) -> dict[str, Any]:
    """The configurations of UNet and text encoders."""
    if info.source.startswith("random:"):
        return ARCHITECTURES[info.source.removeprefix("random:")]
    if Path(info.source).is_file():
        return dict(read_single_file(Path(info.source), "base.model").configs)
    place: dict[str, Any] = {"revision": info.revision or None}
    try:
        texts = {
            name: CLIPTextConfig.from_pretrained(info.source, subfolder=name, **place).to_dict()
            for name in FAMILIES[info.family].text_encoder_classes
        }
        return texts | {"unet": UNet2DConditionModel.load_config(info.source, subfolder="unet", **place)}
    except (OSError, *NO_MODEL) as error:
        raise BaseModelError(
            f"a configuration of {info.model} cannot be read: {first_line(error)}", "base.model", "Save it again."
        ) from error

"""The layers of a base under the two names they have: diffusers' and transformers', and those of the original, LDM.

Everything is told by the live modules, so shapes alone (the meta device) are enough, and no table of names is shared
with the code that writes files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..architectures import FamilyName
from ..models import Base

_WITHIN_TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm")
_OUTSIDE_OF_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_WITHIN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Layer:
    """A module with a weight."""

    component: str
    path: str
    """Dotted; in text encoders with `text_model.`, as transformers had it until 5.6 and every client has it."""
    ldm: str
    """Dotted path in the original UNet; empty in text encoders."""
    kind: str
    """The name of its class."""
    within: frozenset[str]
    """The names of the classes of the modules that hold it."""
    shape: tuple[int, ...]
    """Of its weight."""

    @property
    def is_projection(self) -> bool:
        return self.kind in ("Linear", "Conv2d")


@dataclass(frozen=True)
class Tree:
    """All layers of a base."""

    family: FamilyName
    layers: tuple[Layer, ...]
    per_block: int
    """How many modules LDM counts for each block of one side: its residual layers, and the resampling after them."""
    text_width: int
    """Of what the UNet's cross-attention reads."""
    flattened: frozenset[str]
    """Text encoders whose live modules have no `text_model.`."""

    @classmethod
    def of(cls, base: Base) -> Tree:
        """Of a base or its skeleton, adapted or not."""
        unet: Any = base.unet
        ldm = _ldm_blocks(unet)
        return cls(
            family=base.info.family,
            layers=tuple(
                Layer(
                    component=component,
                    path=path if component == "unet" else with_text_model(path),
                    ldm=_ldm_path(path, ldm) if component == "unet" else "",
                    kind=type(module).__name__,
                    within=frozenset(type(holder).__name__ for holder in holders),
                    shape=tuple(module.weight.shape),
                )
                for component, root in base.components.items()
                for path, module, holders in _weighted(root)
            ),
            per_block=len(unet.down_blocks[0].resnets) + 1,
            text_width=int(unet.config["cross_attention_dim"]),
            flattened=frozenset(
                name for name, root in base.components.items() if name != "unet" and not hasattr(root, "text_model")
            ),
        )

    @cached_property
    def unet(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.component == "unet")

    @cached_property
    def texts(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.component != "unet")


def underlined(path: str) -> str:
    """As a path is written in the names of kohya's files."""
    return path.replace(".", "_")


def with_text_model(path: str) -> str:
    return f"text_model.{path}" if path.startswith(_WITHIN_TEXT_MODEL) else path


def _weighted(root: nn.Module) -> Iterator[tuple[str, Any, list[nn.Module]]]:
    """Path, module and holders of each module with a weight of its own; of adapted ones the plain layer."""
    adapted = ""
    for name, module in root.named_modules():
        if adapted and name.startswith(adapted):
            continue
        own: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        adapted = f"{name}." if isinstance(module, BaseTunerLayer) else ""
        if "weight" in own._parameters and own.weight is not None:
            parts = name.split(".")
            yield name, own, [root.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]


def _ldm_blocks(unet: Any) -> dict[str, str]:
    """LDM's name of each part of a block: it numbers all that follows one another on a side in a row.

    A residual layer and the attention after it are parts 0 and 1 of one number. Downsampling has a number of its own;
    upsampling is the next part of the block's last number: 1 where the block has no attention, else 2.
    """
    names, number = {}, 1
    for b, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    names |= {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)}
    names["mid_block.attentions.0"] = "middle_block.1"
    number = 0
    for b, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        part = 2 if getattr(block, "attentions", None) else 1
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{part}.conv"
    return names


def _ldm_path(path: str, blocks: dict[str, str]) -> str:
    if path in _OUTSIDE_OF_BLOCKS:
        return _OUTSIDE_OF_BLOCKS[path]
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        start, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if start in blocks:
            inner = _WITHIN_RESNET.get(rest, rest) if ".resnets." in f"{start}." else rest
            return f"{blocks[start]}.{inner}" if inner else blocks[start]
    return path

"""Which layers get an adapter, and each one's rank and alpha: targets, `train_only` and `[[block]]`.

Only layers that all clients know are named here; what a client does not know, it would drop without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import AdapterSection, BlockSection, Targets
from .errors import ConfigError
from .models import Base
from .paths import lies_in, path_of, refuse_idle

_ATTENTION = r".*\.attn[12]\.to_(?:q|k|v|out\.0)"
_FEED_FORWARD = r".*\.(?:ff\.net\.(?:0\.proj|2)|proj_in|proj_out)"
_TIME = r".*\.time_emb_proj"
_CONVOLUTION = r".*\.(?:conv1|conv2|conv_shortcut|(?:down|up)samplers\.0\.conv)"
_UNET: dict[Targets, str] = {
    "attention": _ATTENTION,
    "attention+ff": "|".join((_ATTENTION, _FEED_FORWARD)),
    "all-linear": "|".join((_ATTENTION, _FEED_FORWARD, _TIME)),
    "all": "|".join((_ATTENTION, _FEED_FORWARD, _TIME, _CONVOLUTION)),
    # https://arxiv.org/abs/2403.14572: of SDXL's blocks the one whose attention holds style and colour
    "style-blocks": r"up_blocks\.0\.attentions\.1\..*" + _ATTENTION,
}
# All four of q, k, v and out: A1111 ignores the attention of OpenCLIP text encoders unless all four are there.
_TEXT_ATTENTION = r".*\.self_attn\.(?:q|k|v|out)_proj"
_TEXT = _TEXT_ATTENTION + r"|.*\.mlp\.fc[12]"


@dataclass(frozen=True)
class Layer:
    """One layer that gets an adapter."""

    name: str
    """Dotted path inside its component."""
    rank: int
    alpha: float


def layers_of(
    base: Base, components: Mapping[str, Any], settings: AdapterSection, blocks: Sequence[BlockSection] = ()
) -> dict[str, list[Layer]]:
    """The layers that get an adapter, by component.

    Raises:
        ConfigError: for every name in `train_only` that matches nothing, and for `style-blocks` on another family than
            SDXL.
    """
    if settings.targets == "style-blocks" and base.info.family != "sdxl":
        what = "is known for SDXL only: in which block another family keeps its style has not been found"
        raise ConfigError(what, "adapter.targets", 'Set adapter.targets = "attention", or name blocks in train_only.')
    targeted = {name: list(_targeted(base, name, module, settings.targets)) for name, module in components.items()}
    paths = [path_of(component, name) for component, names in targeted.items() for name, _ in names]
    refuse_idle("adapter.train_only", settings.train_only, paths)
    return {
        component: [
            _layer(name, module, component, settings, blocks)
            for name, module in names
            if not settings.train_only or any(lies_in(path_of(component, name), b) for b in settings.train_only)
        ]
        for component, names in targeted.items()
    }


def _targeted(base: Base, component: str, module: nn.Module, targets: Targets) -> Iterator[tuple[str, nn.Module]]:
    pattern = _UNET[targets] if component == "unet" else _TEXT_ATTENTION if targets == "attention" else _TEXT
    unread = base.family.unread_layers(component, module)
    for name, layer in module.named_modules():
        is_read = not unread or not re.fullmatch(unread, name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and is_read and re.fullmatch(pattern, name):
            yield name, layer


def _layer(
    name: str, module: nn.Module, component: str, settings: AdapterSection, blocks: Sequence[BlockSection]
) -> Layer:
    """Of several blocks that hold a layer, the last that says something of it counts."""
    rank, alpha = settings.rank, settings.alpha
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        rank, alpha = _with_rank(rank, alpha, settings.conv_rank, settings.conv_alpha)
    for block in blocks:
        if lies_in(path_of(component, name), block.path):
            rank, alpha = _with_rank(rank, alpha, block.rank, block.alpha)
    return Layer(name, rank, alpha)


def _with_rank(rank: int, alpha: float, other: int, other_alpha: float) -> tuple[int, float]:
    """Another rank and alpha, where they are given; an alpha that is not keeps its ratio to the rank."""
    return other or rank, other_alpha or (alpha * other / rank if other else alpha)

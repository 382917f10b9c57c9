"""Interpolation in weight space, of changes: other strengths (WiSE-FT), and the mean of several changes of one layer.

What is trained of a base is a point in weight space, and so is what lies on the way to it (Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903) or between two of them (model soups, Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482). A point is a layer's weight, hence the change of it, and never the factors of that:
the mean of two products is not the product of the means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import trained_layers
from .delta import Changes, Delta, lora
from .errors import Problem, UserError
from .export import trained_changes
from .models import Base
from .paths import path_of
from .strengths import Strengths

_SHOWN = 3


def scaled(base: Base, strengths: Strengths, changes: Changes | None = None) -> dict[str, list[Delta]]:
    """What the live adapters, or `changes` made of them, change at these strengths; layers at 0 are left out.

    Raises:
        UserError: if a block that is named holds nothing of it, if all is at strength 0, or if a layer's change, as
            that of a DoRA, has no half of the same kind.
        ExportError: if the live adapters do not act as they were trained.
    """
    changes = trained_changes(base) if changes is None else changes
    layers = [(component, delta.name) for component, deltas in changes.items() for delta in deltas]
    strengths.refuse_idle([*layers, *trained_layers(base)])
    strengths.refuse_nothing(layers)
    odd: list[str] = []
    found: dict[str, list[Delta]] = {}
    for component, deltas in changes.items():
        for delta in deltas:
            factor = strengths.of(component, delta.name)
            if factor not in (0, 1) and delta.form == "dora":
                odd.append(path_of(component, delta.name))
            elif factor:
                found.setdefault(component, []).append(delta if factor == 1 else delta.times(factor))
    if odd:
        what = f"a DoRA has no half: its change at strength {strengths} is not in proportion to any of its tensors"
        fix = "Bake a plain LoRA of it, which has: add --bake RANK. Or give whole blocks strength 0 or 1."
        raise UserError.of(Problem(where, what, fix) for where in odd[:_SHOWN])
    return found


def added(total: Delta | None, share: float, delta: Delta, weight: Tensor) -> Delta:
    """`total` + `share` x `delta`, changes of one layer's `weight`; on the CPU, in tensors of its own.

    Exact: of plain LoRAs the factors stand side by side, so that ranks add up; of all other kinds the change itself
    is kept, (out, in[, kh, kw]) in fp32.
    """
    if delta.is_plain and (total is None or total.is_plain):
        down, up = delta.down.float(), share * delta.scale * delta.up.float()
        before = [] if total is None else [total]
        down = torch.cat([*(one.down for one in before), down.cpu()])
        up = torch.cat([*(one.scale * one.up for one in before), up.cpu()], 1)
        return lora(delta.name, down, up, float(len(down)))
    change = (share * delta.of(weight)).cpu()
    return Delta(delta.name, {"diff": change if total is None else total.of(change) + change}, 0.0)

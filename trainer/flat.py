"""What is trained as views of one tensor for each learning rate.

An adapter has hundreds of small matrices. The optimizer's step, the norm of all gradients and the setting back to zero
are one operation each where they lie side by side. Layers, averages, checkpoints and exports see their own matrices as
before: those are views of the whole, and so are their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import RunConfig
from .idle import ADAPTERS


def can_be_flat(config: RunConfig) -> bool:
    """Whether nothing looks at single matrices: AdamW changes each number by itself, but would not leave out a matrix
    of a layer that module dropout left out. A whole model has few and large matrices, and no room for another copy."""
    is_adapter = config.adapter.kind in ADAPTERS and not config.adapter.module_dropout
    return config.runtime.flat_optimizer and config.optimizer.kind == "adamw" and is_adapter


class Flat:
    """Parameters of some groups, laid side by side; the groups then hold one parameter each."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.shapes = [[parameter.shape for parameter in group["params"]] for group in groups]
        self.wholes = [_laid_side_by_side(group["params"]) for group in groups]
        for group, whole in zip(groups, self.wholes, strict=True):
            group["params"] = [whole]

    def zero_grad(self) -> None:
        """Set the gradients back in place: they are views, which a new tensor would not be."""
        for whole in self.wholes:
            assert whole.grad is not None
            whole.grad.zero_()

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state as if it had seen each parameter by itself: checkpoints do not tell the two apart."""
        state = optimizer.state_dict()
        groups, single = [], {}
        for group, shapes in zip(state["param_groups"], self.shapes, strict=True):
            [whole] = group["params"]
            numbers = list(range(len(single), len(single) + len(shapes)))
            groups.append(group | {"params": numbers})
            single |= dict(zip(numbers, _parted(state["state"].get(whole, {}), shapes), strict=True))
        return {"state": {number: values for number, values in single.items() if values}, "param_groups": groups}

    def side_by_side(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Back from `state_dict`; None if it is of other parameters."""
        if [len(group["params"]) for group in state["param_groups"]] != list(map(len, self.shapes)):
            return None
        groups, wholes = [], {}
        for number, group in enumerate(state["param_groups"]):
            groups.append(group | {"params": [number]})
            single = [state["state"][one] for one in group["params"] if one in state["state"]]
            if single and len(single) != len(group["params"]):
                return None
            if single:
                wholes[number] = _joined(single)
        return {"state": wholes, "param_groups": groups}


def _laid_side_by_side(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    whole = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    whole.grad = torch.zeros_like(whole)
    sizes = [parameter.numel() for parameter in parameters]
    pairs = zip(whole.detach().split(sizes), whole.grad.split(sizes), strict=True)
    for parameter, (values, gradients) in zip(parameters, pairs, strict=True):
        parameter.data, parameter.grad = values.view(parameter.shape), gradients.view(parameter.shape)
    return whole


def _parted(values: dict[str, Any], shapes: Sequence[torch.Size]) -> list[dict[str, Any]]:
    """What the optimizer keeps of a whole, for each of its parts; a count of steps is the same for all."""
    sizes = [shape.numel() for shape in shapes]
    parted: list[dict[str, Any]] = [{} for _ in shapes]
    for name, value in values.items():
        is_whole = isinstance(value, Tensor) and value.numel() == sum(sizes) and value.dim() == 1
        parts = value.split(sizes) if is_whole else [value] * len(shapes)
        for kept, part, shape in zip(parted, parts, shapes, strict=True):
            kept[name] = part.view(shape).clone() if is_whole else part
    return parted


def _joined(single: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the optimizer keeps of each part, for the whole."""
    first = single[0]
    return {
        name: torch.cat([one[name].flatten() for one in single]) if _is_of_each_number(value) else value
        for name, value in first.items()
    }


def _is_of_each_number(value: Any) -> bool:
    """Whether it is kept for each number of a parameter, as averages of gradients are, and not once, as steps are."""
    return isinstance(value, Tensor) and value.dim() > 0

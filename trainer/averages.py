"""Weights that are better to use than those that are being trained: averages of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim import Optimizer

from .optim import averages_itself


class Averages:
    """A running average of what is trained, or the weights that a schedule-free optimizer means to be used.

    The running average, in the parameters' own precision, has the decay min(ema_decay, (1 + n) / (10 + n)) after n
    steps, so that it soon forgets the untrained start (diffusers' EMAModel). Most runs have neither: then it is false,
    and nothing ever happens.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: Optimizer, ema_decay: float = 0.0) -> None:
        self.optimizer: Any = optimizer if averages_itself(type(optimizer)) else None
        self.parameters = parameters
        self.ema = EMAModel(self.parameters, decay=ema_decay, foreach=True) if ema_decay else None

    def __bool__(self) -> bool:
        return self.ema is not None or self.optimizer is not None

    def update(self) -> None:
        """The optimizer has taken a step."""
        if self.ema:
            self.ema.step(self.parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters are the averaged ones; after it, bit for bit, those that are trained."""
        if not self:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if self.optimizer:
                self.optimizer.eval()
            if self.ema:
                self.ema.copy_to(self.parameters)
            yield
        finally:
            if self.optimizer:
                self.optimizer.train()  # which comes back only about to where it was
            with torch.no_grad():
                for parameter, value in zip(self.parameters, trained, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What resume needs beside the weights and the optimizer's own state; plain values and tensors."""
        return self.ema.state_dict() if self.ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a run that had no running average before, it begins with the weights there are now."""
        if self.ema and state:
            self.ema.load_state_dict(state | {"decay": self.ema.decay})
            self.ema.to(self.parameters[0].device)
        elif self.ema:
            self.ema = EMAModel(self.parameters, decay=self.ema.decay, foreach=True)

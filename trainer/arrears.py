"""Steps that the device may still be taking, and that nobody has been told of yet.

To look at a number that a GPU computes is to wait for the GPU. So what is to be told of a step stays on the device, and
is read for several steps at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..datasets.buckets import Shot

MOST = 10
"""Steps that are read together at most."""
LONGEST = 1.0
"""Seconds after which they are read in any case: nobody who looks at a slow run should wait for ten steps."""


@dataclass(frozen=True)
class Taken:
    """A step, as the host knows it."""

    step: int
    images: int
    """Seen by its end, from the start of the run."""
    batches: list[list[Shot]]
    rates: list[float]
    started: float
    """By `time.perf_counter`."""


@dataclass(frozen=True)
class Figures:
    """A step, as the device knows it."""

    loss: float
    grad_norm: float
    """Before clipping."""
    weight_norm: float
    """After the step."""

    def looked_at(self, is_scaled: bool) -> Iterator[tuple[str, float]]:
        """What must be finite, by name. fp16's gradient scaler looks at gradients itself, and skips such a step."""
        yield "loss", self.loss
        if not is_scaled:
            yield "gradient", self.grad_norm
        yield "norm of the weights", self.weight_norm


def steps_ahead(accelerator: Accelerator) -> int:
    """How many steps may be taken before the first of them is told. On a CPU nothing is waited for; processes look at
    the same step together; and fp16's gradient scaler looks at each step, so that it is waited for in any case."""
    is_waited_for = accelerator.num_processes > 1 or accelerator.scaler is not None
    return 1 if accelerator.device.type == "cpu" or is_waited_for else MOST


class Arrears:
    """The steps that wait to be told, in order."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.figures = torch.zeros(most, 3, device=device)
        self.waiting: list[Taken] = []

    @property
    def are_due(self) -> bool:
        full = len(self.waiting) == len(self.figures)
        return full or (bool(self.waiting) and time.perf_counter() - self.waiting[0].started >= LONGEST)

    def add(self, taken: Taken, figures: Tensor) -> None:
        """`figures` (3,) are those of `Figures`; they are copied on the device, and not looked at."""
        self.figures[len(self.waiting)].copy_(figures)
        self.waiting.append(taken)

    def read(self) -> tuple[list[tuple[Taken, Figures]], float]:
        """All that wait, which wait no more, and the seconds that each of them took, on the average."""
        taken, self.waiting = self.waiting, []
        figures = [Figures(*row) for row in self.figures[: len(taken)].tolist()] if taken else []
        seconds = (time.perf_counter() - taken[0].started) / len(taken) if taken else 0.0
        return list(zip(taken, figures, strict=True)), seconds

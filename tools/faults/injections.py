"""What is done to a process from within, before its command begins. Nothing of it is in the product.

Each acts once, on the n-th call of something, and lets all others pass; that it did, a file tells in the folder where
the process runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRUCK = "struck"
"""The file."""
UNET, ENCODER, DECODER, TEXT = "UNet2DConditionModel", "Encoder", "Decoder", "CLIPTextModel"
"""Classes of modules: what denoises, what makes latents of pictures and pictures of latents, what reads captions."""


@dataclass(frozen=True)
class Call:
    """The n-th call of a module of a class, counted from 1; those with gradients, or those without."""

    module: str
    number: int = 1
    trains: bool = False

    def before(self, act: Callable[[], Any]) -> None:
        """Do something before it."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        is_it = self._counted()
        register_module_forward_pre_hook(lambda module, _: act() if is_it(module) else None)

    def after(self, act: Callable[[Any], Any]) -> None:
        """Do something to the tensor that comes out of it."""
        from torch.nn.modules.module import register_module_forward_hook

        is_it = self._counted()

        def hook(module: Any, _: Any, output: Any) -> None:
            if is_it(module):
                act(output if hasattr(output, "register_hook") else output[0])

        register_module_forward_hook(hook)

    def _counted(self) -> Callable[[Any], bool]:
        import torch

        calls = itertools.count(1)

        def is_it(module: Any) -> bool:
            is_one = type(module).__name__ == self.module and torch.is_grad_enabled() == self.trains
            return is_one and _strikes(next(calls) == self.number)

        return is_it


def out_of_memory(when: Call) -> None:
    when.before(_raise_out_of_memory)


def out_of_memory_in_backward(number: int) -> None:
    """In the n-th backward pass, when all its gradients are there already."""
    import torch

    real, calls = torch.Tensor.backward, itertools.count(1)

    def backward(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        if _strikes(next(calls) == number):
            _raise_out_of_memory()

    torch.Tensor.backward = backward  # pyright: ignore[reportAttributeAccessIssue]


def _raise_out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory")


def no_number(when: Call) -> None:
    """NaN in what comes out, without a word to autograd."""
    when.after(lambda tensor: tensor.data.fill_(float("nan")))


def no_number_in_gradients(when: Call) -> None:
    when.after(lambda tensor: tensor.register_hook(lambda gradient: gradient * float("nan")))


def held_up(when: Call, here: Path, until: Path) -> None:
    """Say that it has come so far, and wait there for a file."""

    def hold() -> None:
        here.touch()
        while not until.exists():
            time.sleep(0.005)

    when.before(hold)


def clock_jumps(seconds: float, at: int) -> None:
    """The computer's clock, as Python tells it, is another from the n-th look on."""
    real, looks = time.time, itertools.count(1)
    time.time = lambda: real() + (seconds if _strikes(next(looks) >= at) else 0.0)


def _strikes(now: bool) -> bool:
    if now:
        Path(STRUCK).touch()
    return now


def starts_at(moment: float) -> None:
    """Wait for a moment of the clock that only goes forward, which is the same in all processes."""
    while time.monotonic() < moment:
        pass

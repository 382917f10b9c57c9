"""The GPU's memory is full, once: the error that PyTorch then raises, where it would raise it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..fault import Attempt, Fault, Struck
from ..injections import DECODER, ENCODER, TEXT, UNET, Call, out_of_memory, out_of_memory_in_backward
from ..processes import Injection

ROUNDING = 2e-4
"""A batch that was halved is summed in another order; what is trained goes as far as 0.01."""


def _in(injections: dict[str, Injection], rounding: float = 0.0) -> Callable[[Attempt], Struck]:
    def strike(attempt: Attempt) -> Struck:
        where = list(injections)[attempt.number]
        return attempt.trained_with(injections[where], where, rounding)

    return strike


def _fault(name: str, what: str, injections: dict[str, Injection], rounding: float = 0.0) -> Fault:
    return Fault(f"out of memory in {name}", what, len(injections), _in(injections, rounding))


FAULTS = [
    _fault(
        "forward",
        "The UNet finds no memory in a training step.",
        {f"step {step}": partial(out_of_memory, Call(UNET, step, trains=True)) for step in (1, 4)},
        ROUNDING,
    ),
    _fault(
        "backward",
        "The same when gradients are there already.",
        {f"step {step}": partial(out_of_memory_in_backward, step) for step in (1, 4)},
        ROUNDING,
    ),
    _fault(
        "sampling",
        "The VAE finds none when previews are decoded.",
        {f"previews {number}": partial(out_of_memory, Call(DECODER, number)) for number in (1, 2)},
    ),
    _fault(
        "caching",
        "The VAE finds none when a picture is encoded, or the text encoder when a caption is.",
        {
            "picture 2": partial(out_of_memory, Call(ENCODER, 2)),
            "caption 2": partial(out_of_memory, Call(TEXT, 2)),
        },
    ),
]

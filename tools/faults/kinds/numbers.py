"""Something is no number, once: a bit has flipped, or a driver has slipped."""

from __future__ import annotations

from functools import partial

from ..fault import Attempt, Fault, Struck
from ..injections import ENCODER, UNET, Call, no_number, no_number_in_gradients

STEPS_STRUCK = (1, 4)


def in_loss(attempt: Attempt) -> Struck:
    step = STEPS_STRUCK[attempt.number]
    return attempt.trained_with(partial(no_number, Call(UNET, step, trains=True)), f"step {step}")


def in_gradient(attempt: Attempt) -> Struck:
    step = STEPS_STRUCK[attempt.number]
    return attempt.trained_with(partial(no_number_in_gradients, Call(UNET, step, trains=True)), f"step {step}")


def in_latent(attempt: Attempt) -> Struck:
    picture = attempt.number + 1
    return attempt.trained_with(partial(no_number, Call(ENCODER, picture)), f"picture {picture}")


FAULTS = [
    Fault("NaN in loss", "What the UNet predicts is no number.", len(STEPS_STRUCK), in_loss),
    Fault("NaN in gradient", "What comes back to it is none.", len(STEPS_STRUCK), in_gradient),
    Fault("NaN in latent", "What the VAE makes of a picture is none.", 2, in_latent),
]

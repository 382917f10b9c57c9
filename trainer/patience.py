"""Which validation loss of a run is the lowest, and for how long it has been: what to keep, and when to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from .checkpoint import TrainState


def take_in(state: TrainState, losses: Sequence[float], of: str) -> None:
    """Let a state know what was measured at its step: it is the lowest so far, or was not lower once more. `losses` are
    those of each prediction of `of`, a hash of what was measured."""
    begins = not state.best_step or state.best_of != of
    if all(map(math.isfinite, losses)) and (begins or is_lower(losses, state.best_losses)):
        state.best_step, state.best_losses, state.best_of, state.not_lower = state.step, list(losses), of, 0
    else:
        state.not_lower += 1


def is_lower(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether they are lower by more than their noise: the mean difference of the same predictions is above its
    standard error."""
    differences = [other - loss for loss, other in zip(losses, others, strict=True)]
    spread = stdev(differences) if len(differences) > 1 else 0.0
    return fmean(differences) > spread / math.sqrt(len(differences))

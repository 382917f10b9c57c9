"""The process is gone from one moment to the next, as when the power fails."""

from __future__ import annotations

import signal

from ..fault import Attempt, Fault, Struck
from ..saved import Saved

TIMES = 50
_EVERY_FRESH = 10
"""Each so many attempts the process is one that has to import torch first, and is killed in its first seconds."""
_IMPORTS = 8.0
"""Seconds of them."""


def killed(attempt: Attempt) -> Struck:
    """SIGKILL at a random moment of a run's life."""
    trial, is_fresh = attempt.begin(), attempt.number % _EVERY_FRESH == _EVERY_FRESH - 1
    start = trial.start_fresh if is_fresh else trial.start
    seconds = attempt.random.uniform(0, _IMPORTS if is_fresh else attempt.material.seconds)
    process = start("train", trial.file)
    process.ends_within(seconds)
    saved = Saved.of(trial.run)
    process.send(signal.SIGKILL)
    ended = process.wait()
    where = f"after {seconds:.2f} s" + (" of a new interpreter" if is_fresh else "")
    return Struck(trial, where, ended, saved, is_counted=not is_fresh)


FAULTS = [Fault("SIGKILL", "At random moments of a run's whole life, from its imports to its export.", TIMES, killed)]

"""The clock is put back: after a journey, by a server, when the battery was empty."""

from __future__ import annotations

import signal
from functools import partial

from ..fault import Attempt, Fault, Struck
from ..injections import clock_jumps
from ..material import KILLED_AT
from ..saved import Saved

_DAY = 24 * 3600.0
LOOKS = (5, 12, 20)
"""Before which look at the clock it is put back: each line of the log is one."""


def put_back(attempt: Attempt) -> Struck:
    """Within a run; or a run of tomorrow was killed, and is resumed today."""
    if attempt.number < len(LOOKS):
        look = LOOKS[attempt.number]
        return attempt.trained_with(partial(clock_jumps, -_DAY, look), f"by a day, before look {look}")
    trial = attempt.begin()
    process = trial.start("train", trial.file, inject=partial(clock_jumps, _DAY, 1))
    process.until(trial.told(lambda _: KILLED_AT in trial.steps()))
    saved = Saved.of(trial.run)
    process.send(signal.SIGKILL)
    return Struck(trial, "by a day, between a kill and its resume", process.wait(), saved)


FAULTS = [Fault("clock goes back", "By a day: within a run, and before it is resumed.", len(LOOKS) + 1, put_back)]

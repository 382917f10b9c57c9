"""Someone ends the process: with a word, or without one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product

from lorasmith.trainer.errors import INTERRUPTED
from lorasmith.trainer.events import Event, Phase, Step
from lorasmith.trainer.story import DRAWING, EXPORTING, SAVING

from ..fault import Attempt, Fault, Struck
from ..material import STEPS
from ..saved import Saved

Moment = Callable[[list[Event]], bool]
"""Whether it has come, by what the log tells."""


def _phase(name: str, times: int = 1) -> Moment:
    return lambda events: sum(isinstance(event, Phase) and event.name == name for event in events) >= times


MOMENTS: dict[str, Moment] = {
    "before its first word": lambda _: True,
    "loading": _phase("loading the base"),
    "encoding": _phase("encoding images"),
    "the first previews": _phase(DRAWING),
    "a step": lambda events: sum(isinstance(event, Step) for event in events) >= 3,
    "saving": _phase(SAVING),
    "sampling": _phase(DRAWING, 2),
    "exporting": _phase(EXPORTING),
}
_POLITE = [signal.SIGTERM, signal.SIGINT]
_PLACES = list(product(MOMENTS, _POLITE))


def polite(attempt: Attempt) -> Struck:
    """One signal: what was trained is saved, to the last step."""
    return _signalled(attempt, 1)


def impatient(attempt: Attempt) -> Struck:
    """A second signal right after the first: it ends at once."""
    return _signalled(attempt, 2)


def _signalled(attempt: Attempt, times: int) -> Struck:
    name, number = _PLACES[attempt.number]
    trial = attempt.begin()
    process = trial.start("train", trial.file)
    came = process.until(lambda: trial.run.config.exists()) and process.until(trial.told(MOMENTS[name]))
    saved = Saved.of(trial.run)
    for _ in range(times):
        process.send(number)
    ended = process.wait()
    slips = [] if came else ["it ended before that moment"]
    if ended not in (0, INTERRUPTED, -number):
        slips.append(f"it ended with {ended}")
    status = trial.run.status()
    if status.state == "stopped" and status.saved_step != status.step:
        slips.append(f"it stopped at step {status.step}, and saved step {status.saved_step}")
    if times == 1 and 0 < status.step < STEPS and status.state != "stopped":
        slips.append(f"it was asked to stop at step {status.step}, and is {status.state}")
    return Struck(trial, f"{number.name} at {name}", ended, saved, slips=tuple(slips))


FAULTS = [
    Fault("signal", f"SIGTERM or SIGINT: {', '.join(MOMENTS)}.", len(_PLACES), polite),
    Fault("two signals", "The same, and a second one at once.", len(_PLACES), impatient),
]

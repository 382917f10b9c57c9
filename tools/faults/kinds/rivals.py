"""Two processes that want the same run at the same instant."""

from __future__ import annotations

import time
from functools import partial

from ..fault import Attempt, Fault, Struck
from ..injections import starts_at
from ..saved import Saved

_UNTIL_BOTH_ARE_THERE = 0.3  # seconds
REFUSALS = ("another process is training this run", "is in use", "has gone on meanwhile")


def two_trainers(attempt: Attempt) -> Struck:
    """Both begin a run of one name, or both resume one: one trains, the other is refused by name."""
    trial = attempt.half_way() if attempt.number % 2 else attempt.begin()
    arguments = ("resume", trial.run.path) if attempt.number % 2 else ("train", trial.file)
    saved, moment = Saved.of(trial.run), time.monotonic() + _UNTIL_BOTH_ARE_THERE
    both = [
        trial.start(*arguments, inject=partial(starts_at, moment), said=trial.folder / f"said {number}.txt")
        for number in (1, 2)
    ]
    codes = [process.wait() for process in both]
    if sorted(codes) != [0, 2]:
        slips = (f"they ended with {codes}: {both[0].last_words} | {both[1].last_words}",)
    else:
        words = both[codes.index(2)].words
        is_named = str(trial.run.path) in words and any(refusal in words for refusal in REFUSALS)
        slips = () if is_named else (f"the second was refused with: {words}",)
    return Struck(trial, arguments[0], 0, saved, slips=slips)


FAULTS = [Fault("two trainers", "Two processes begin or resume one run at the same instant.", 20, two_trainers)]

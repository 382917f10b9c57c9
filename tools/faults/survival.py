"""What it is to survive, for every fault alike.

(a) The status is true: of a process that is dead nothing is said to go on, `done` is said only of what is done, no step
    is told that was not taken, and a process that ended by itself has said why, for a person.
(b) Every checkpoint, preview and export that was complete before is byte for byte what it was, and every file under a
    public name is whole.
(c) `resume` goes on to the end, and what was trained equals that of an unbroken run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.trainer.status import ACTIVE

from .fault import Struck
from .material import STEPS, Material, difference, exported, trained
from .processes import Hangs
from .saved import Saved, damaged, thing


@dataclass(frozen=True)
class Examined:
    """What came of a fault."""

    slips: list[str]
    """What was not as it should be; empty: survived."""
    lost: list[str]
    """What was saved and is gone or damaged."""


def examine(struck: Struck, material: Material) -> Examined:
    """All that is asked after a fault; what it has put out of order is mended on the way."""
    run = struck.trial.run
    slips = [*struck.slips, *untrue(struck)]

    struck.mend()
    after, broken = Saved.of(run), damaged(run, struck.spoiled)
    lost = struck.saved.lost(after, struck.spoiled)

    slips += not_to_the_end(struck)
    lost |= after.without_exports().lost(Saved.of(run), struck.spoiled)
    broken |= damaged(run)
    slips += differences(struck, material)

    slips += [f"{name} is gone or has changed" for name in sorted(lost)]
    slips += [f"{name} is not whole ({why})" for name, why in broken.items()]
    return Examined(slips, sorted(lost | set(map(thing, broken))))


def untrue(struck: Struck) -> Iterator[str]:
    """What is said of the run that is not so."""
    trial, ended = struck.trial, struck.ended
    if "Traceback (most recent call last)" in trial.words():
        yield f"it ended without a word for a person: {trial.words().strip().splitlines()[-1]}"
    if not trial.run.config.exists():
        return  # nothing was begun, and nothing says that it was
    status = trial.run.status()
    if status.state in (*ACTIVE, "queued"):
        yield f"the status is {status.state}, and no process works on it"
    if status.state == "done" and (STEPS not in trial.run.saved_steps() or not exported(trial.run)):
        yield "the status is done, and it is not"
    if ended == 0 and status.state not in ("done", "stopped"):
        yield f"the process ended well, and the status is {status.state}"
    if ended in (1, 2) and status.state in ("done", "stopped"):
        yield f"the process ended with {ended}, and the status is {status.state}"
    if struck.is_counted and status.step > trial.taken():
        yield f"the status tells of step {status.step}, and {trial.taken()} were taken"


def not_to_the_end(struck: Struck) -> Iterator[str]:
    """Why it did not go on to its end, if it did not."""
    trial = struck.trial
    if trial.run.config.exists() and trial.run.status().state == "done":
        return
    process = trial.go_on(struck.resume)
    try:
        code = process.wait()
    except Hangs as hangs:
        yield str(hangs)
        return
    status = trial.run.status()
    if code or (status.state, status.step) != ("done", STEPS):
        yield f"resumed, it is {status.state} at step {status.step} of {STEPS}, exit code {code}: {process.last_words}"


def differences(struck: Struck, material: Material) -> Iterator[str]:
    """What is not as in the unbroken run: what was trained, and the files to share."""
    whole = (struck.like or material.whole).run
    for name, meant in {"what was trained": trained(whole), **exported(whole)}.items():
        try:
            found = {"what was trained": trained(struck.trial.run), **exported(struck.trial.run)}[name]
        except (OSError, KeyError) as error:
            yield f"{name} is not there ({error})"
        else:
            if why := difference(found, meant, struck.rounding):
                yield f"{name}, is not that of the unbroken run: {why}"

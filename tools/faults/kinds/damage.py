"""Files are not as they were written: torn, cut short, with a bit flipped, or left behind by the dead."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from lorasmith.trainer.owner import ProcessId

from ..fault import Attempt, Fault, Struck
from ..saved import Saved

FILES = ("adapter.safetensors", "trained.safetensors", "optimizer.pt", "state.json", "origin.json")


def torn_log(attempt: Attempt) -> Struck:
    """The log of a run that was killed, or of one that is done, ends at a random byte."""
    trial = attempt.finished() if attempt.number % 2 else attempt.half_way()
    size = trial.run.events.stat().st_size
    at = attempt.random.randrange(size)
    os.truncate(trial.run.events, at)
    return Struck(trial, f"at byte {at} of {size}", saved=Saved.of(trial.run))


def half_written(attempt: Attempt) -> Struck:
    """A file of the newest checkpoint is cut short."""
    return _newest_checkpoint(attempt, _cut)


def flipped_bit(attempt: Attempt) -> Struck:
    """In a file of the newest checkpoint a bit is another."""
    return _newest_checkpoint(attempt, _flip)


def _newest_checkpoint(attempt: Attempt, harm: Callable[[Path, random.Random], str]) -> Struck:
    """It is named, and so is the one before, from which it goes on."""
    trial = attempt.half_way()
    *_, before, newest = trial.run.saved_steps()
    saved, folder = Saved.of(trial.run), trial.run.checkpoint(newest)
    where = harm(folder / FILES[attempt.number % len(FILES)], attempt.random)
    ended = trial.go_on().wait()
    named = f"{folder}: " in trial.words() and f"--from {before}" in trial.words()
    slips = ("the damaged checkpoint was not named, or not what to do",) if ended and not named else ()
    spoiled = (f"checkpoints/{folder.name}/",)
    return Struck(trial, where, ended, saved, spoiled, resume=("--from", str(before)), slips=slips)


def cache_entry(attempt: Attempt) -> Struck:
    """In a cached entry a bit is another; it is found, and made anew."""
    trial = attempt.half_way()
    entries = sorted(trial.cache.rglob("*.safetensors"))
    return Struck(trial, _flip(attempt.random.choice(entries), attempt.random), saved=Saved.of(trial.run))


def _cut(file: Path, random: random.Random) -> str:
    at = random.randrange(file.stat().st_size)
    os.truncate(file, at)
    return f"{file.name} cut at byte {at}"


def _flip(file: Path, random: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at, bit = random.randrange(len(content)), random.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} of {len(content)} in {file.name}"


def left_behind(attempt: Attempt) -> Struck:
    """Who trains the run is said by a file of someone who is dead, or that is damaged; he was asked to stop, too."""
    trial = attempt.half_way()
    where, owner = list(_owners().items())[attempt.number]
    trial.run.owner_file.write_text(owner, encoding="utf-8")
    for request in ("stop", "save"):
        trial.run.request(request).write_text(next(iter(_owners().values())), encoding="utf-8")
    return Struck(trial, where, saved=Saved.of(trial.run), spoiled=(trial.run.owner_file.name,))


def _owners() -> dict[str, str]:
    """What the file holds, by what has happened. The number is that of a living process with no part in the run."""
    mine = ProcessId.of(os.getpid())
    others = {
        "its number is another process's now": replace(mine, created=mine.created - 5000, ticks=mine.ticks - 1),
        "the computer was started again": replace(mine, created=mine.created - 5000, boot="another start"),
    }
    whole = {what: json.dumps(asdict(owner)) for what, owner in others.items()}
    return whole | {"it is half-written": '{"pid": 12', "it is empty": ""}


FAULTS = [
    Fault("torn event log", "The log of a killed or finished run ends at a random byte.", 10, torn_log),
    Fault("half-written checkpoint", "A file of the newest checkpoint is cut at a random byte.", 8, half_written),
    Fault("flipped bit in a checkpoint", "A random bit in a file of the newest checkpoint.", 12, flipped_bit),
    Fault("flipped bit in the cache", "A random bit in a latent or an embedding.", 8, cache_entry),
    Fault(
        "stale owner file",
        "The file that names the trainer is of the dead, or damaged; old requests too.",
        4,
        left_behind,
    ),
]

"""The dataset's folder: it cannot be written to, it is unplugged, a process that reads it dies."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path

import psutil

from ..fault import Attempt, Fault, Struck
from ..injections import ENCODER, Call, held_up
from ..saved import Saved
from ..trial import Trial
from .disk import mount, unmount

MANY = 200
"""Pictures that are worth processes of their own to read them."""


def read_only(attempt: Attempt) -> Struck:
    """Training writes nothing there, so it is no hindrance."""
    trial = attempt.begin()
    mount("--bind", str(trial.pictures), at=trial.pictures)
    attempt.undo.callback(unmount, trial.pictures)
    mount("-o", "remount,bind,ro", at=trial.pictures)
    ended = trial.start("train", trial.file).wait()
    return Struck(trial, "", ended, slips=() if ended == 0 else (f"it was in the way: {trial.words()}",))


def unplugged(attempt: Attempt) -> Struck:
    return [_before, _while_encoding, _while_training, _before_resume][attempt.number](attempt)


def _before(attempt: Attempt) -> Struck:
    trial = attempt.begin()
    away = _unplug(trial)
    ended = trial.start("train", trial.file).wait()
    slips = () if ended == 2 and str(trial.pictures) in trial.words() else ("it was not refused by its name",)
    return Struck(trial, "before the run", ended, mend=partial(_plug_in, away, trial), slips=slips)


def _while_encoding(attempt: Attempt) -> Struck:
    trial = attempt.begin()
    here, go_on = trial.folder / "here", trial.folder / "go-on"
    process = trial.start("train", trial.file, inject=partial(held_up, Call(ENCODER, 2), here, go_on))
    process.until(here.exists)
    away = _unplug(trial)
    go_on.touch()
    ended = process.wait()
    slips = () if ended in (1, 2) and str(trial.pictures) in trial.words() else ("it did not say that it is gone",)
    return Struck(trial, "while encoding", ended, mend=partial(_plug_in, away, trial), slips=slips)


def _while_training(attempt: Attempt) -> Struck:
    """All that is needed is cached by then."""
    trial = attempt.begin()
    process = trial.start("train", trial.file)
    process.until(trial.told(lambda _: 1 in trial.steps()))
    away, saved = _unplug(trial), Saved.of(trial.run)
    ended = process.wait()
    slips = () if ended == 0 else ("it was in the way, though all is cached",)
    return Struck(trial, "while training", ended, saved, mend=partial(_plug_in, away, trial), slips=slips)


def _before_resume(attempt: Attempt) -> Struck:
    trial = attempt.half_way()
    away, saved = _unplug(trial), Saved.of(trial.run)
    ended = trial.go_on().wait()
    slips = () if ended == 2 and str(trial.pictures) in trial.words() else ("it was not refused by its name",)
    return Struck(trial, "before a resume", ended, saved, mend=partial(_plug_in, away, trial), slips=slips)


def _unplug(trial: Trial) -> Path:
    return trial.pictures.rename(trial.folder / "away")


def _plug_in(away: Path, trial: Trial) -> None:
    away.rename(trial.pictures)


def reader_dies(attempt: Attempt) -> Struck:
    """Of the processes that look at many pictures, one is killed. The run may go on without it, or say why not."""
    whole = attempt.material.begin(attempt.folder / "whole")
    few = sorted(whole.pictures.glob("*.png"))
    for number in range(MANY):
        shutil.copy(few[number % len(few)], whole.pictures / f"more {number}.png")
    trial = whole.copied(attempt.folder / "struck")
    process = whole.start("train", whole.file)
    slips = [f"without a fault it ended with {process.words}"] if process.wait() else []
    process = trial.start("train", trial.file)
    process.until(lambda: _readers(process.pid))
    _readers(process.pid)[0].send_signal(signal.SIGKILL)
    return Struck(trial, "while it reads the pictures", process.wait(), like=whole, slips=tuple(slips))


def _readers(pid: int) -> list[psutil.Process]:
    """The processes that it has started to read files for it."""
    return [child for child in psutil.Process(pid).children() if any("spawn_main" in word for word in child.cmdline())]


FAULTS = [
    Fault("read-only dataset", "The folder of pictures takes no file.", 1, read_only),
    Fault(
        "dataset unplugged", "It is gone before a run, while encoding, while training, before a resume.", 4, unplugged
    ),
    Fault("data worker dies", "A process that reads pictures is killed.", 1, reader_dies),
]

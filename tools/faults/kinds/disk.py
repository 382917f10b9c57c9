"""A disk that fills up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..fault import Attempt, Fault, NotHere, Struck
from ..saved import Saved
from ..trial import Trial

PLACES = 24
_MIB = 16
"""The size of the small disk; a run folder with its cache needs less."""
_PAGE = 4096


def full(attempt: Attempt) -> Struck:
    """So many KiB are free when the run begins; then room is made."""
    trial = attempt.begin()
    trial.disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={_MIB}m", "lorasmith", at=trial.disk)
    attempt.undo.callback(unmount, trial.disk)
    free = attempt.number * _needed(attempt.material.whole) // (PLACES - 1)
    ballast = trial.disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (_MIB << 20) - free - _PAGE)
    ended = trial.start("train", trial.file).wait()
    slips = () if ended in (0, 1, 2) else (f"it ended with {ended}",)
    return Struck(trial, f"{free >> 10} KiB free", ended, Saved.of(trial.run), mend=ballast.unlink, slips=slips)


def _needed(whole: Trial) -> int:
    """Bytes that are enough: of all that a run leaves on the disk, and half of that for what lies there in between."""
    sizes = [file.stat().st_size if file.is_file() else _PAGE for file in whole.disk.rglob("*")]
    return sum(-(-size // _PAGE) * _PAGE for size in sizes) * 3 // 2


def mount(*options: str, at: Path) -> None:
    """Mount something at a folder.

    Raises:
        NotHere: if this user may not.
    """
    if subprocess.run(["mount", *options, str(at)], capture_output=True, check=False).returncode:
        raise NotHere("this user can mount nothing, nor can unshare")


def unmount(at: Path) -> None:
    subprocess.run(["umount", "--lazy", str(at)], check=True)


FAULTS = [Fault("disk full", "Room for nothing, for everything, and for each size in between.", PLACES, full)]

"""The queue's worker is killed, alone or with the run that it watches over."""

from __future__ import annotations

import os
import signal

from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.owner import Owner, read_process
from lorasmith.trainer.queue import Queue

from ..fault import Attempt, Fault, Struck
from ..material import difference, trained
from ..processes import wait_until
from ..saved import Saved


def worker_killed(attempt: Attempt) -> Struck:
    """Of two runs the first goes on without a worker, if it lives; the next worker trains the second."""
    trial = attempt.begin()
    queue, second = Queue(trial.runs), RunFolder(trial.runs / "second")
    for owner in (queue.worker, trial.run.owner, second.owner):
        attempt.undo.callback(kill, owner)
    slips = []
    for further in ([], ["--set", "name=second"]):
        if code := trial.start("queue", "add", trial.file, *further).wait():
            slips.append(f"queue add ended with {code}")
    wait_until(lambda: trial.steps())
    saved, with_its_run = Saved.of(trial.run), attempt.number == 1
    kill(queue.worker)
    if with_its_run:
        kill(trial.run.owner)
    if second.status().state != "queued":
        slips.append(f"the second run waits, and its status is {second.status().state}")
    wait_until(lambda: not trial.run.owner_alive())
    if code := trial.start("queue", "work", trial.runs).wait():
        slips.append(f"the next worker ended with {code}")
    if second.status().state != "done" or difference(trained(second), trained(attempt.material.whole.run)):
        slips.append(f"the second run is {second.status().state}, or has trained something else")
    where = "with the run that it watches over" if with_its_run else "alone"
    return Struck(trial, where, -signal.SIGKILL if with_its_run else 0, saved, slips=tuple(slips), is_counted=False)


def kill(owner: Owner) -> None:
    """The process that a file names, if it lives."""
    process = read_process(owner.file)
    if process and process.alive():
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not process.alive())


FAULTS = [
    Fault("queue worker killed", "SIGKILL, alone or together with the run that it has started.", 2, worker_killed)
]

"""The queue: runs that wait are trained one after the other, by a process that outlives whoever put them there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .changes import changed_for_resume, refuse_spent
from .config import RunConfig
from .errors import RunError
from .events import EventLog, Failed
from .jobs import RunFolder, create_run, find_runs, saved_step, start_detached
from .owner import Owner, ProcessId
from .story import Story
from .waiting import Current, Entry, changed_waiting, read_waiting

_SECONDS_BETWEEN_LOOKS = 0.5


class Queue:
    """The runs of a folder that wait, and the process that works through them."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs.absolute()

    @property
    def worker(self) -> Owner:
        """Which process works through the queue."""
        return Owner(self.runs / ".worker.json")

    @property
    def log(self) -> Path:
        """What the worker said."""
        return self.runs / ".worker.log"

    def waiting(self) -> list[Entry]:
        """The runs that wait, the next one first."""
        return read_waiting(self.runs).entries

    def running(self) -> str | None:
        """The name of the run that is worked on now, whoever started it; None if there is none."""
        current = read_waiting(self.runs).current
        if current and current.process.alive():
            return current.entry.name
        return next((run.name for run in find_runs(self.runs) if run.owner_alive()), None)

    def add(self, name: str, overrides: Sequence[str] = (), from_step: int | None = None) -> None:
        """Put a run at the end; it is started at once if nothing else runs.

        Raises:
            RunError: if it waits already, or is being trained.
        """
        run = RunFolder(self.runs / name)
        with changed_waiting(self.runs) as waiting:
            if waiting.has(name):
                raise RunError("waits in the queue already", str(run.path), "It will be trained when its turn comes.")
            if run.status().is_active:
                raise RunError("is being trained", str(run.path), f"Stop it first: lorasmith stop {run.path}")
            waiting.entries.append(Entry(name, tuple(overrides), from_step))
        self.ensure_worker()

    def remove(self, name: str) -> None:
        """Take a run out; its folder stays.

        Raises:
            RunError: if it does not wait.
        """
        with changed_waiting(self.runs) as waiting:
            self._require(name, waiting.has(name))
            waiting.drop(name)

    def move(self, name: str, by: int) -> None:
        """Let a run wait so many places longer, or, below 0, less long.

        Raises:
            RunError: if it does not wait.
        """
        with changed_waiting(self.runs) as waiting:
            self._require(name, waiting.has(name))
            [place] = [place for place, entry in enumerate(waiting.entries) if entry.name == name]
            entry = waiting.entries.pop(place)
            waiting.entries.insert(max(0, place + by), entry)

    def _require(self, name: str, waits: bool) -> None:
        if not waits:
            raise RunError("does not wait in the queue", str(self.runs / name), "See: lorasmith queue list")

    def ensure_worker(self) -> None:
        """Start the worker if a run waits and none lives, as after the computer was switched off."""
        if self.waiting() and not self.worker.alive():
            start_detached(["queue", "work", str(self.runs)], self.log)


def begin(config: RunConfig, queue: Queue) -> RunFolder:
    """Make a run folder of a validated configuration, and put it in the queue.

    Raises:
        RunError: if the name is in use, or the folder cannot be written.
    """
    run = create_run(config.model_copy(update={"runs": str(queue.runs)}))
    queue.add(run.name)
    return run


def go_on(run: RunFolder, queue: Queue, overrides: Sequence[str] = (), from_step: int | None = None) -> None:
    """Put a run in the queue that is to be resumed, or, with a larger budget, extended; or begun, if it never was.

    Raises:
        RunError: if it runs or waits already, if the overrides would make it another run, if it is done, or if it has
            no checkpoint of that step.
        ConfigError: if an override is wrong.
    """
    config, story = changed_for_resume(run, overrides), Story(run.events)
    if run.status(story).state == "done" and from_step is None:
        refuse_spent(run, config, story.steps.images[-1] if story.steps else 0, config.budget.images)
    if from_step is not None:
        saved_step(run, from_step)
    queue.add(run.name, overrides, from_step)


# ---------------------------------------------------------------------------------------------------------------------
# the worker


def work(runs: Path) -> None:
    """Train what waits, one run at a time, and end when nothing waits; of several workers one stays."""
    queue = Queue(runs)
    if not queue.worker.take():
        return
    while queue.worker.hold():
        _wait_for_the_current(queue)
        while queue.running():  # a run that was started on the command line
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        with changed_waiting(queue.runs) as waiting:  # nobody can add a run between the look at the list and the end
            if not waiting.entries:
                queue.worker.give_up()
                return
            waiting.current = _started(queue, waiting.entries.pop(0))


def _started(queue: Queue, entry: Entry) -> Current | None:
    """The run whose turn it is now; None if its folder is there no more."""
    run = RunFolder(queue.runs / entry.name)
    if not run.config.is_file():
        print(f"{run.path} is there no more", flush=True)
        return None
    size, arguments = EventLog(run.events).size(), ["resume", str(run.path), "--tell"]
    for override in entry.overrides:
        arguments += ["--set", override]
    if entry.from_step is not None:
        arguments += ["--from", str(entry.from_step)]
    return Current(entry, size, ProcessId.of_started(start_detached(arguments, run.log).pid))


def _wait_for_the_current(queue: Queue) -> None:
    """Until the process ends that was started for a run, by this worker or by one that was killed since."""
    current = read_waiting(queue.runs).current
    if current is None:
        return
    while current.process.alive():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _tell_if_it_could_not(RunFolder(queue.runs / current.entry.name), current.log_size)
    with changed_waiting(queue.runs) as waiting:
        waiting.current = None


def _tell_if_it_could_not(run: RunFolder, size: int) -> None:
    """A process that ended before its first event has nothing to show but its log; `size` is that of the events."""
    story = Story(run.events)
    story.refresh()
    if run.config.is_file() and story.size <= size:
        said = run.log.read_text(encoding="utf-8", errors="replace").split("\n") if run.log.is_file() else []
        why = next((line.strip() for line in reversed(said) if line.strip()), "")
        log = EventLog(run.events)
        log.append(Failed(f"its process ended before it began: {why}", story.step, f"Read all that it said: {run.log}"))

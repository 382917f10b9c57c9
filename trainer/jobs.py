"""Run folders: create, find, describe, ask. The folder is the single source of truth; a status is never a lie."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import psutil

from .config import RunConfig
from .configfile import read_config, write_config
from .errors import RunError, TakenOverError
from .events import Done, Failed, Stopped
from .files import atomic_folder, remove, remove_leftovers, rename, writable, write_text
from .jsonfile import read_json
from .owner import Owner, ProcessId, read_process, write_process
from .status import State, Status
from .story import DRAWING, EXPORTING, SAVING, VALIDATING, Story
from .waiting import Current, WaitingList, changed_waiting, read_waiting

Request = Literal["stop", "save", "sample"]
"""What a run that trains can be asked for, by a file of this name in its folder."""
_WHAT_IT_DOES: dict[Request, str] = {
    "stop": "will save and stop",
    "save": "will save",
    "sample": "will draw previews",
}
_PHASES: dict[str, State] = {
    DRAWING: "sampling",
    VALIDATING: "training",
    SAVING: "saving",
    EXPORTING: "exporting",
}

VERIFIED = "-verified.json"
"""What the name of a file ends in that says how near exported files are to what was trained, by client."""


class Chosen(NamedTuple):
    """The checkpoint that was chosen by eye, and the strength to use it at."""

    step: int
    strength: float


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/` and the names of what is in it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def log(self) -> Path:
        """What the processes said that the queue has started for this run."""
        return self.path / "trainer.log"

    @property
    def owner_file(self) -> Path:
        return self.path / "trainer.json"

    @property
    def owner(self) -> Owner:
        """Which process trains this run."""
        return Owner(self.owner_file)

    def request(self, what: Request) -> Path:
        """The file that asks for something; the trainer takes it away when it has seen it."""
        return self.path / what

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint, rising; a copy such as `step-000100.bak` is passed over."""
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        return sorted(int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name)))

    def set_aside_checkpoints(self, after: int) -> None:
        """Call those after a step by another name: the run goes on from there, and will save them anew."""
        for step in self.saved_steps():
            if step > after:
                aside = self.checkpoint(step).with_suffix(".set-aside")
                shutil.rmtree(aside, ignore_errors=True)
                rename(self.checkpoint(step).rename, aside)

    def read_config(self) -> RunConfig:
        return read_config(self.config)

    def status(self, story: Story | None = None) -> Status:
        """Read from the events; a run without a last word is active only while its process lives.

        Of a story that is kept, what is new is read.
        """
        story, alive = story or Story(self.events), self.owner.alive()
        story.refresh()  # after the look at the process: it may have had its last word in between
        state = self._state(story, alive, read_waiting(self.path.parent))
        failure = story.last_word if isinstance(story.last_word, Failed) and state == "failed" else Failed("")
        why = story.last_word.why if isinstance(story.last_word, Done) and state == "done" else ""
        saved_step = max(self.saved_steps(), default=0)
        status = Status(
            state=state,
            step=max(story.step, saved_step),  # of a log that was torn: what was saved was taken
            steps=story.plan.steps if story.plan else 0,
            saved_step=saved_step,
            message=failure.message or why,
            fix=failure.fix,
            overrides=tuple(failure.overrides),
            anew=tuple(failure.anew),
            resume_from=failure.resume_from,
            loss=story.loss,
        )
        return _in_progress(status, story, alive) if status.is_active else status

    def _state(self, story: Story, alive: bool, waiting: WaitingList) -> State:
        if alive and not story.ended:
            if story.phase:
                return _PHASES.get(story.phase.name, "preparing")
            return "training" if story.plan else "preparing"
        if (turn := self._turn(waiting)) and turn.process.alive() and not story.ended_since(turn.log_size):
            return "preparing"
        if waiting.has(self.name):
            return "queued"
        match story.last_word:
            case Done():
                return "done"
            case Stopped():
                return "stopped"
            case Failed():
                return "failed"
        return "interrupted" if story.last is not None or self.owner_file.exists() else "new"

    def _turn(self, waiting: WaitingList) -> Current | None:
        """What the queue has started for this run, if it is its turn."""
        return waiting.current if waiting.current and waiting.current.entry.name == self.name else None

    def _worked_on_by(self) -> ProcessId | None:
        """The living process that trains this run, or was started to."""
        turn = self._turn(read_waiting(self.path.parent))
        found = (read_process(self.owner_file), turn.process if turn else None)
        return next((process for process in found if process and process.alive()), None)

    def owner_alive(self) -> bool:
        """Whether the process that trains this run still lives on this computer."""
        return self.owner.alive()

    def take_ownership(self) -> None:
        """Say that this process trains the run, and clear away what one that died has left: what it was asked for, and
        what it had half written.

        Raises:
            RunError: if another living process trains it.
        """
        if not self.owner.take():
            raise RunError(
                "another process is training this run", str(self.path), f"Stop it with: lorasmith stop {self.path}"
            )
        for request in map(self.request, _WHAT_IT_DOES):
            if _is_of_another_time(request):
                remove(request)
        remove_leftovers(self.path, below=True)
        for gone in self.checkpoints.glob(".step-*.gone"):  # so earlier versions called what they were removing
            shutil.rmtree(gone, ignore_errors=True)

    def hold_ownership(self) -> None:
        """Go on training the run; said again and again.

        Raises:
            TakenOverError: if another process trains it now.
        """
        if not self.owner.hold():
            what = "another process has taken this run over, perhaps one of another computer, so this one has ended"
            fix = f"What was saved stands. See how it goes on with: lorasmith runs {self.path.parent}"
            raise TakenOverError(what, str(self.path), fix)

    def give_up_ownership(self) -> None:
        """Say that this process trains the run no more, and forget what it was asked for."""
        if self.owner.is_mine():
            for request in map(self.request, _WHAT_IT_DOES):
                with suppress(OSError):  # a disk that takes nothing any more: the next owner sees whom it was asked of
                    remove(request)
        self.owner.give_up()

    # -- requests -----------------------------------------------------------------------------------------------------

    def ask_to_stop(self) -> str:
        """Ask the trainer to save and end after its current step; a run that waits in the queue leaves it.

        Returns what will happen, in a sentence.

        Raises:
            RunError: if nothing is training the run.
        """
        if self.status().state == "queued":
            with changed_waiting(self.path.parent) as waiting:
                if waiting.has(self.name):  # else its turn has come just now
                    waiting.drop(self.name)
                    return f"{self.name} waits in the queue no more."
        return self._ask("stop")

    def ask_to_save(self) -> str:
        """Ask the trainer for a checkpoint of its current step; otherwise as `ask_to_stop`."""
        return self._ask("save")

    def ask_to_sample(self) -> str:
        """Ask the trainer for previews of its current step; otherwise as `ask_to_stop`."""
        return self._ask("sample")

    def _ask(self, what: Request) -> str:
        status, asked = self.status(), self._worked_on_by()
        if not (status.is_active and asked):
            raise RunError(
                f"is not being trained ({status.sentence.rstrip('.')})",
                str(self.path),
                f"There is nothing to {'draw' if what == 'sample' else what}.",
            )
        if status.state == "exporting":
            return f"{self.name} has taken its last step, and is being exported."
        write_process(self.request(what), asked)
        return f"{self.name} {_WHAT_IT_DOES[what]} after its current step."

    def take_request(self, what: Request) -> bool:
        """Whether something was asked for, of this process or by hand of whoever trains; it is then answered."""
        asked = read_process(self.request(what))
        is_for_another = asked is not None and asked.pid != os.getpid()
        return not is_for_another and remove(self.request(what))

    # -- what a person has chosen -------------------------------------------------------------------------------------

    @property
    def chosen(self) -> Chosen | None:
        """The checkpoint and strength that were chosen; None if none were, or the checkpoint is there no more."""
        try:
            values = read_json(self.path / "chosen.json")
            chosen = Chosen(int(values["step"]), float(values["strength"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        return chosen if self.checkpoint(chosen.step).is_dir() else None

    def choose(self, step: int, strength: float) -> None:
        write_text(self.path / "chosen.json", json.dumps({"step": step, "strength": strength}) + "\n")


def _is_of_another_time(request: Path) -> bool:
    """Whether something was asked of a process that is dead; by hand, whether before this one was started."""
    if asked := read_process(request):
        return not asked.alive()
    return request.exists() and request.stat().st_mtime < psutil.Process().create_time()


def _in_progress(status: Status, story: Story, alive: bool) -> Status:
    """The status with what can be told of a run only while it goes on."""
    pace, left, phase = story.seconds_per_step, story.seconds_left(), story.phase if alive else None
    if left is not None and story.last is not None:
        left = max(0.0, left - max(0.0, time.time() - story.last))  # the clock may have been set back
    doing = f"{phase.name[0].upper()}{phase.name[1:]}" if phase and status.state == "preparing" else ""
    counted = f", {phase.done} of {phase.total}" if phase and phase.total else ""
    return replace(
        status,
        message=doing and doing + counted,
        left=left if status.state in ("training", "sampling", "saving") else None,
        rate=1 / pace if pace else None,
        memory=_memory(story.steps.memory_mib[-1]) if story.steps else "",
    )


def _memory(mib: float) -> str:
    """As the makers of GPUs count: 1 GB is 1024 MiB."""
    return f"{mib / 1024:.1f} GB" if mib else ""


def saved_step(run: RunFolder, step: int | None) -> int:
    """A step that has a checkpoint; None is the newest.

    Raises:
        RunError: if there is no such checkpoint.
    """
    saved = run.saved_steps()
    if not saved or (step is not None and step not in saved):
        there = ", ".join(map(str, saved)) or "none"
        raise RunError(
            f"has no checkpoint of step {step}" if saved else "has no checkpoint yet",
            str(run.path),
            f"Checkpoints: {there}.",
        )
    return saved[-1] if step is None else step


def check_name_is_free(config: RunConfig) -> Path:
    """The path the run folder will have.

    Raises:
        RunError: if the name is in use, or the folder cannot be written.
    """
    path = (Path(config.runs).expanduser() / config.name).absolute()
    if path.exists():
        is_run = (path / "config.toml").exists()
        described = RunFolder(path).status().sentence.rstrip(".") if is_run else "it is not a run"
        raise RunError(
            f"the name {config.name!r} is in use ({described})",
            str(path),
            "Choose another name (--set name=...), or continue it with: lorasmith resume " + str(path),
        )
    if reason := writable(path.parent):
        raise RunError(reason, "runs", "Set runs to a folder you may write to (--set runs=...).")
    return path


def free_name(runs: Path, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... that is not in use; a number at its end is counted on."""
    stem = re.sub(r"-\d+$", "", name)
    number = 1
    candidate = name
    while name and os.path.lexists(runs / candidate):  # of a name too long it says that it is not there
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def create_run(config: RunConfig) -> RunFolder:
    """Make the run folder with its complete `config.toml`; it appears whole, or not at all.

    Raises:
        RunError: if the name is in use, or the folder cannot be written.
    """
    path = check_name_is_free(config)
    remove_leftovers(path.parent)
    try:
        with atomic_folder(path, replace=False) as temporary:
            write_config(config, temporary / "config.toml")
    except OSError as error:
        check_name_is_free(config)  # another process may have taken it meanwhile
        raise RunError(
            f"{path} cannot be written ({error.strerror})",
            "runs",
            "Set runs to a folder you may write to (--set runs=...).",
        ) from error
    return RunFolder(path)


def open_run(path: Path) -> RunFolder:
    """A run by its folder, or by its name under `runs/`.

    Raises:
        RunError: if it is no run folder.
    """
    for candidate in (path, Path("runs") / path):
        if (candidate / "config.toml").is_file():
            return RunFolder(candidate.absolute())
    raise RunError("is not a run folder (it has no config.toml)", str(path), "See the runs with: lorasmith runs")


def preview_files(folder: Path) -> list[Path]:
    """The previews of a step, in its folder, by number; whatever else a person has put there is left alone."""
    return sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())


def find_runs(folder: Path) -> Iterator[RunFolder]:
    """All runs in a folder, newest first; what is hidden is a run that was never written to its end."""
    configs = [file for file in folder.glob("*/config.toml") if not file.parent.name.startswith(".")]
    for config in sorted(configs, key=lambda file: file.stat().st_mtime, reverse=True):
        yield RunFolder(config.parent.absolute())


def is_main_process() -> bool:
    """Whether this is the one of the processes of a run that writes its folder."""
    return os.environ.get("RANK", "0") == "0"


def start_detached(arguments: list[str], log: Path) -> subprocess.Popen[Any]:
    """Run a `lorasmith` command in a process of its own, which outlives this one; what it says is added to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        said.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} lorasmith {shlex.join(arguments)}\n".encode())
        said.flush()
        return detached(arguments, said, subprocess.STDOUT)


def detached(
    arguments: Sequence[str], out: IO[bytes], complaints: IO[bytes] | int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[Any]:
    """Likewise, with its output and its complaints apart, and with `environment` laid over that of this process."""
    command = [sys.executable, "-m", "lorasmith.trainer.cli", *arguments]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": {**os.environ, **(environment or {})}}
    if os.name == "nt":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS  # pyright: ignore[reportAttributeAccessIssue]
    else:
        options["start_new_session"] = True
    process = subprocess.Popen(command, stdout=out, stderr=complaints, **options)
    threading.Thread(target=process.wait, daemon=True).start()  # else it would stay a zombie when it ends
    return process

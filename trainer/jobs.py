"""Run folders: create, find, describe, stop. The folder is the single source of truth; a status is never a lie."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from .config import RunConfig
from .configfile import read_config, write_config
from .errors import RunError
from .events import Done, Event, Failed, PlanMade, Step, Stopped, read_events
from .files import atomic_folder, locked, writable, write_text

State = Literal["running", "done", "stopped", "failed", "interrupted", "new"]


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    state: State
    step: int
    """The last step that was taken."""
    steps: int
    """The number of steps that were planned; 0 if that is not known yet."""
    saved_step: int
    """The last step with a checkpoint."""
    message: str = ""

    @property
    def sentence(self) -> str:
        match self.state:
            case "running":
                return f"training, step {self.step} of {self.steps}" if self.steps else "preparing"
            case "done":
                return f"done, {self.step} steps"
            case "stopped":
                return f"stopped and saved at step {self.saved_step} of {self.steps}"
            case "failed":
                return f"failed at step {self.step}: {self.message}"
            case "interrupted":
                return f"interrupted at step {self.step} of {self.steps}, saved up to step {self.saved_step}"
            case "new":
                return "not started"


VERIFIED = "-verified.json"
"""What the name of a file ends in that says how near exported files are to what was trained, by client."""


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
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def owner_file(self) -> Path:
        """Which process trains this run."""
        return self.path / "trainer.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint, rising; a copy such as `step-000100.bak` is passed over."""
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        return sorted(int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name)))

    def read_config(self) -> RunConfig:
        return read_config(self.config)

    def status(self) -> Status:
        """Read from the events; a run without a last word is `running` only while its process lives."""
        step = steps = 0
        saved = max(self.saved_steps(), default=0)
        last: Event | None = None
        word: Done | Stopped | Failed | None = None  # the last one that no step has followed
        for record in read_events(self.events):
            match last := record.event:
                case PlanMade(steps=planned):
                    steps = planned
                case Step(step=number):
                    step, word = number, None
                case Done() | Stopped() | Failed():
                    word = last
        if last is not word and self.owner_alive():
            return Status("running", step, steps, saved)
        match word:
            case Done():
                return Status("done", word.step, steps, saved)
            case Stopped():
                return Status("stopped", word.step, steps, saved)
            case Failed():
                return Status("failed", step, steps, saved, word.message)
        return Status("interrupted" if last else "new", step, steps, saved)

    def owner_alive(self) -> bool:
        """Whether the process that wrote `trainer.json` still runs on this computer.

        A killed process whose parent has not taken note of it yet, a zombie, does not.
        """
        try:
            owner = json.loads(self.owner_file.read_text(encoding="utf-8"))
            process = psutil.Process(owner["pid"])
            same = abs(process.create_time() - owner["created"]) < 2  # and not a later one of the same number
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return False

    def take_ownership(self) -> None:
        """Say that this process trains the run; of several that say so at once, one may.

        Raises:
            RunError: if another living process does.
        """
        with locked(self.path / ".trainer.lock"):
            if self.owner_alive():
                raise RunError(
                    "another process is training this run", str(self.path), f"Stop it with: lorasmith stop {self.path}"
                )
            me = psutil.Process(os.getpid())
            write_text(self.owner_file, json.dumps({"pid": me.pid, "created": me.create_time()}) + "\n")
            self.stop_file.unlink(missing_ok=True)

    def give_up_ownership(self) -> None:
        self.owner_file.unlink(missing_ok=True)

    def ask_to_stop(self) -> None:
        """Create the `stop` file; the trainer saves and ends after its current step.

        Raises:
            RunError: if nothing is training the run.
        """
        if not self.owner_alive():
            raise RunError(
                f"is not being trained ({self.status().sentence})", str(self.path), "There is nothing to stop."
            )
        self.stop_file.touch()


def check_name_is_free(config: RunConfig) -> Path:
    """The path the run folder will have.

    Raises:
        RunError: if the name is in use, or the folder cannot be written.
    """
    path = (Path(config.runs).expanduser() / config.name).absolute()
    if path.exists():
        described = RunFolder(path).status().sentence if (path / "config.toml").exists() else "it is not a run"
        raise RunError(
            f"the name {config.name!r} is in use ({described})",
            str(path),
            "Choose another name (--set name=...), or continue it with: lorasmith resume " + str(path),
        )
    if reason := writable(path.parent):
        raise RunError(reason, "runs", "Set runs to a folder you may write to (--set runs=...).")
    return path


def create_run(config: RunConfig) -> RunFolder:
    """Make the run folder with its complete `config.toml`; it appears whole, or not at all.

    Raises:
        RunError: if the name is in use, or the folder cannot be written.
    """
    path = check_name_is_free(config)
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


def find_runs(folder: Path) -> Iterator[RunFolder]:
    """All runs in a folder, newest first; what is hidden is a run that was never written to its end."""
    configs = [file for file in folder.glob("*/config.toml") if not file.parent.name.startswith(".")]
    for config in sorted(configs, key=lambda file: file.stat().st_mtime, reverse=True):
        yield RunFolder(config.parent.absolute())


def is_main_process() -> bool:
    """Whether this is the one of the processes of a run that writes its folder."""
    return os.environ.get("RANK", "0") == "0"


def start_detached(arguments: list[str], log: Path) -> subprocess.Popen[Any]:
    """Run a `lorasmith` command in a process of its own, which outlives this one; what it says goes to `log`."""
    command = [sys.executable, "-m", "lorasmith.trainer.cli", *arguments]
    options: dict = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    if os.name == "nt":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS  # pyright: ignore[reportAttributeAccessIssue]
    else:
        options["start_new_session"] = True
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, **options)
    threading.Thread(target=process.wait, daemon=True).start()  # else it would stay a zombie when it ends
    return process

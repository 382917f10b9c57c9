"""`lorasmith` commands in real processes: forked from one that has imported everything, or with a new interpreter.

What is forked runs the very command line, `lorasmith.trainer.cli.main` with its arguments, and is a process like any
other, with a number, signals and an exit code; only the seconds of importing torch are saved.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

Injection = Callable[[], None]
"""What is done within the process before its command begins; importable, for it is sent there."""

LONGEST = 240.0
"""Seconds. A process that takes longer hangs."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",  # what is killed leaves a semaphore of a progress bar
}
_LOOKS = 0.002  # seconds between two looks at something that is waited for

_server = get_context("forkserver")
_server.set_forkserver_preload(["tools.faults.warm"])
_asking = threading.RLock()  # the exit code of a forked process can be read once, by one thread


class Hangs(Exception):  # noqa: N818 (the fault is another's)
    """A process did not end."""


@dataclass
class Process:
    """A command that was started."""

    pid: int
    said: Path
    """What it has printed."""
    ends_within: Callable[[float], bool]
    _exit_code: Callable[[], int | None]

    def alive(self) -> bool:
        return not self.ends_within(0)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one that comes too late reaches nobody."""
        if self.alive():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or the signal that ended it, negative.

        Raises:
            Hangs: if it does not end; it is killed then.
        """
        if not self.ends_within(LONGEST):
            self._give_up()
        code = self._exit_code()
        assert code is not None
        return code

    def until(self, condition: Callable[[], Any]) -> bool:
        """Wait for something to become true; False if the process ended first.

        Raises:
            Hangs: if neither happens; it is killed then.
        """
        end = time.monotonic() + LONGEST
        while not condition():
            if self.ends_within(_LOOKS):
                return bool(condition())
            if time.monotonic() > end:
                self._give_up()
        return True

    def _give_up(self) -> NoReturn:
        self.send(signal.SIGKILL)
        self.ends_within(LONGEST)
        raise Hangs(f"nothing came of the process within {LONGEST:.0f} s; it said: {self.last_words}")

    @property
    def words(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""

    @property
    def last_words(self) -> str:
        return " / ".join([line.strip() for line in self.words.splitlines() if line.strip()][-3:])


def wait_until(condition: Callable[[], Any]) -> None:
    """Likewise, of processes that nobody here has started.

    Raises:
        Hangs: if it does not become true.
    """
    end = time.monotonic() + LONGEST
    while not condition():
        time.sleep(_LOOKS)
        if time.monotonic() > end:
            raise Hangs(f"nothing happened within {LONGEST:.0f} s")


def forked(
    arguments: Sequence[str], folder: Path, said: Path, inject: Injection | None = None, counter: Path | None = None
) -> Process:
    """Run a command in a folder; `counter` is a file that grows by a byte with each step of an optimizer."""
    child = _started(_command, list(arguments), folder, said, inject, counter)

    def ended_within(seconds: float) -> bool:
        return bool(connection.wait([child.sentinel], seconds))

    def exit_code() -> int | None:
        with _asking:
            return child.exitcode

    assert child.pid is not None
    return Process(child.pid, said, ended_within, exit_code)


def fresh(arguments: Sequence[str], folder: Path, said: Path) -> Process:
    """Likewise, with an interpreter of its own, which imports all that it needs."""
    command = [sys.executable, "-m", "lorasmith.trainer.cli", *arguments]
    with said.open("ab") as out:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | _ENVIRONMENT
        )

    def ended_within(seconds: float) -> bool:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    return Process(child.pid, said, ended_within, child.poll)


def called(function: Callable[..., object], *arguments: object) -> None:
    """Call an importable function where torch is imported already, and wait for it."""
    child = _started(function, *arguments)
    connection.wait([child.sentinel])
    with _asking:
        assert child.exitcode == 0, f"{function.__name__} ended with {child.exitcode}"


def _started(function: Callable[..., object], *arguments: object) -> ForkServerProcess:
    os.environ.update(_ENVIRONMENT)  # for the process that is forked from
    child = _server.Process(target=function, args=arguments)
    with _asking:
        child.start()
    return child


def _command(arguments: list[str], folder: Path, said: Path, inject: Injection | None, counter: Path | None) -> None:
    """What a forked process does."""
    import torch

    from lorasmith.trainer import cli

    with said.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["lorasmith", *arguments]
    if counter:
        _count_steps(counter)
    if inject:
        inject()
    cli.main()


def _count_steps(counter: Path) -> None:
    """What was taken, from another source than the run's own log."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    file = counter.open("ab", buffering=0)

    def count(*_: Any) -> None:
        file.write(b".")

    register_optimizer_step_post_hook(count)

"""A process that sets one side up, and then takes steps when it is told to; in between it does nothing.

Each side has a process of its own, so that its memory and its CPU time are its own. Pipes carry orders and answers.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import torch

from ..config import RunConfig
from ..errors import LorasmithError, TrainingError, first_line
from ..events import AttentionChosen, Event, Phase, Warned
from ..loop import Emit
from ..memory import is_full, memory_of
from .figures import Lap, groups
from .peaks import forget_peak, peak, reserved
from .work import matmul_peak, synchronise

_AT_ONCE_ON_A_GPU = 10
"""Steps between two waits for a GPU: more often would hold up a trainer that runs ahead of it, and without any, one
that only queues work would seem fast."""
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
_SMALLER = "Take a smaller --batch or --resolution, measure one side alone, or end what else uses memory."


class Side(Protocol):
    """What is measured."""

    device: torch.device
    dtype: torch.dtype
    """In which most of it is computed."""

    def train(self, should_stop: Callable[[], bool]) -> object:
        """Take steps, until `should_stop`, which is asked before each, says so."""


Make = Callable[[RunConfig, Emit], Side]


@dataclass(frozen=True)
class Block:
    """An order: take so many steps, and tell how long those after the first few took."""

    warmup: int
    steps: int


@dataclass(frozen=True)
class Finish:
    """An order: no more steps will be taken; tell what was seen in all."""


@dataclass(frozen=True)
class Started:
    """The side is set up, and its first step is taken."""

    seconds: float
    """Since the process was started."""
    device: str
    on_cpu: bool
    threads: int
    peak: int
    """Bytes."""


@dataclass(frozen=True)
class Finished:
    """Bytes, and TFLOP a second."""

    peak: int
    """The most memory that the process ever had."""
    training: int | None
    """From the first step on; None where the system cannot tell it from what loading took."""
    reserved: int | None
    matmul: float


class Worker:
    """The process, as it is seen by the one who gives orders; a context manager, at whose end the process is ended."""

    def __init__(self, name: str, make: Make, config: RunConfig, threads: int, tell: Emit, processes: Any) -> None:
        self.name, self.warnings, self._tell = name, list[str](), tell
        self._pipe, self._theirs = processes.Pipe()
        self._process = processes.Process(target=_work, args=(self._theirs, make, config, threads, time.time()))

    def __enter__(self) -> Worker:
        with _deaf_to_ctrl_c():
            self._process.start()
        self._theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def started(self) -> Started:
        """
        Raises:
            LorasmithError: as the side does; a TrainingError of anything else that ended it.
        """
        return self._answer()

    def take(self, block: Block) -> list[Lap]:
        """
        Raises:
            LorasmithError: likewise.
        """
        return self._asked(block)

    def finish(self) -> Finished:
        """
        Raises:
            LorasmithError: likewise.
        """
        return self._asked(Finish())

    def _asked(self, order: Block | Finish) -> Any:
        with suppress(*_GONE):  # then there is no answer either
            self._pipe.send(order)
        return self._answer()

    def _answer(self) -> Any:
        while True:
            if self._pipe not in connection.wait([self._pipe, self._process.sentinel]):
                self._has_ended()
            try:
                said = self._pipe.recv()
            except _GONE:
                self._has_ended()
            match said:
                case Phase():
                    self._tell(replace(said, name=f"{self.name}: {said.name}"))
                case Warned():
                    self.warnings.append(said.message)
                    self._tell(Warned(f"{self.name}: {said.message}"))
                case AttentionChosen():
                    self._tell(replace(said, device=f"{said.device} ({self.name})"))
                case LorasmithError():
                    raise said
                case _:
                    return said

    def _has_ended(self) -> NoReturn:
        self._process.join()
        code = self._process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise TrainingError(f"its process {how}, perhaps because the memory was full", self.name, _SMALLER)


def new_processes() -> Any:
    """How they are started: afresh, on every system, so that a time to the first step is what a person waits."""
    return multiprocessing.get_context("spawn")


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A process that is started within the block inherits this, where the system knows such a thing: Ctrl-C reaches all
    processes of a terminal, and the one who gives orders ends this one."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python lets nobody choose
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# what the process does


def _work(pipe: Connection, make: Make, config: RunConfig, threads: int, began: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as above, for systems on which it is not inherited
    with suppress(*_GONE):
        try:
            _serve(pipe, make, config, threads, began)
        except Exception as error:
            pipe.send(_explained(error, config.name))


def _serve(pipe: Connection, make: Make, config: RunConfig, threads: int, began: float) -> None:
    def emit(event: Event) -> None:
        if isinstance(event, Phase | Warned | AttentionChosen):
            pipe.send(event)

    if threads or not torch.accelerator.is_available():
        torch.set_num_threads(threads or 1)
    side = make(config, emit)
    program = _program(pipe, side, began)
    side.train(lambda: next(program, True))


_GO_ON = False
"""What a program yields to have one more step taken: the answer to whether the side should stop."""


def _program(pipe: Connection, side: Side, began: float) -> Iterator[bool]:
    """What is done before, between and after the steps of a side, which trains in a loop of its own: the one that is
    used in earnest, with all that it does beside its steps."""
    device, loading = side.device, peak(side.device)
    can_forget = forget_peak(device)
    yield _GO_ON
    synchronise(device)
    most = max(loading, peak(device))
    pipe.send(Started(time.time() - began, name_of(device), device.type == "cpu", torch.get_num_threads(), most))
    for order in _orders(pipe):
        if isinstance(order, Block):
            pipe.send((yield from laps(order, device)))
        else:
            training = peak(device)
            most, known = max(loading, training), training if can_forget else None
            pipe.send(Finished(most, known, reserved(device), matmul_peak(device, side.dtype)))


def _orders(pipe: Connection) -> Iterator[Block | Finish]:
    """Until nobody gives any."""
    while True:
        try:
            yield pipe.recv()
        except _GONE:
            return


def laps(block: Block, device: torch.device) -> Generator[bool, None, list[Lap]]:
    """Have the steps of a block taken. On a CPU each kept one is timed alone, on a GPU ten together."""
    for _ in range(block.warmup):
        yield _GO_ON
    synchronise(device)
    timed = []
    for steps in groups(block.steps, 1 if device.type == "cpu" else _AT_ONCE_ON_A_GPU):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            yield _GO_ON
        synchronise(device)
        timed.append(Lap(steps, time.perf_counter() - wall, time.process_time() - cpu))
    return timed


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _explained(error: Exception, name: str) -> LorasmithError:
    """What a person can do; of what only a programmer can, what it is, with its trace above."""
    if isinstance(error, LorasmithError):
        return error
    if is_full(error):
        device = torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu")
        return TrainingError(f"{memory_of(device)} is full", name, _SMALLER)
    traceback.print_exception(error)
    return TrainingError(f"failed with {type(error).__name__}: {first_line(error)}", name, "Its trace stands above.")

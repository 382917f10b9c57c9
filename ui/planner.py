"""Plans for the page. They need torch, for which its own process must not wait, so another one makes them, which the
first plan starts and which stays warm; no torch is imported here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import tomlkit

from ..trainer.architectures import FAMILY_TITLES, FamilyName
from ..trainer.config import RunConfig
from ..trainer.configfile import to_toml, validate
from ..trainer.errors import LorasmithError, Problem, UserError, first_line

T = TypeVar("T")

SOURCE = "settings"
"""What problems call the document that they are in."""
_CAPTIONS = 2
_SIGNS: dict[FamilyName, str] = {
    "sd1": "its text goes into the UNet through 1x1 convolutions, as only that of SD 1 does",
    "sd2": "its text goes into the UNet through linear layers, and the UNet is not told the size of the picture",
    "sdxl": "its UNet is also told the size of the picture, as only that of SDXL is",
}


@dataclass(frozen=True)
class Recognised:
    """What a base model was found to be."""

    model: str
    family: FamilyName
    prediction: str
    resolution: int

    @property
    def sentence(self) -> str:
        """The family, with what it was recognised by."""
        if self.model == "pocket":
            return f"Pocket, the small base that comes with Lorasmith; it draws emoji of {self.resolution} pixels."
        title = f"{FAMILY_TITLES[self.family]}, {self.resolution} pixels"
        predicts = ", predicts v" if self.prediction == "v_prediction" else ""
        return f"{title}{predicts}: {_SIGNS[self.family]}."


@dataclass(frozen=True)
class Planned:
    """A plan as plain values."""

    facts: dict[str, Any]
    """What will be done, as `lorasmith plan --json` tells it."""
    toml: str
    """The complete configuration, every value spelled out."""
    captions: tuple[str, ...]
    """Two captions of the style from its beginning and middle, as they are trained: with their trigger word."""

    @property
    def warnings(self) -> list[str]:
        return self.facts["warnings"]

    @cached_property
    def config(self) -> RunConfig:
        return validate(tomlkit.parse(self.toml).unwrap(), SOURCE)


class Planner:
    """Asks the warm process, one question after another; several requests may ask at once.

    A process that has died is replaced once for each question. It ends when this process does, however that ends.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def plan(self, values: Mapping[str, Any]) -> Planned:
        """The plan of a configuration's given values.

        Raises:
            UserError: with every problem that was found, each with its place and its fix.
        """
        return self._ask(_plan, dict(values))

    def recognise(self, model: str) -> Recognised:
        """What a base model is.

        Raises:
            UserError: if it cannot be found, or is none that can be trained.
        """
        if model == "pocket":  # the first of every visit: no process has to be started for it
            return _recognise(model)
        return self._ask(_recognise, model)

    def close(self) -> None:
        """End the process, when it has answered."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown(cancel_futures=True)

    def _ask(self, work: Callable[[Any], T], asked: Any) -> T:
        try:
            found, problems = self._answer(work, asked)
        except BrokenProcessPool as error:
            what = "the process that makes plans has ended before it answered"
            raise UserError(what, "planner", "Try again; if memory is short, close other programs first.") from error
        if found is None:
            raise UserError.of(problems)
        return found

    def _answer(self, work: Callable[[Any], T], asked: Any) -> tuple[T | None, list[Problem]]:
        pool = self._current()
        try:
            return pool.submit(_told, work, asked).result()
        except BrokenProcessPool:
            self._discard(pool)
            return self._current().submit(_told, work, asked).result()

    def _current(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                spawning = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=spawning, initializer=_begin)
            return self._pool

    def _discard(self, broken: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is broken:
                self._pool = None
        broken.shutdown(wait=False)


# ---------------------------------------------------------------------------------------------------------------------
# in the other process


def _begin() -> None:
    """Load what plans need before the first one is asked for, and leave the processor's cores to those who train."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the page
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from ..trainer import anatomy  # noqa: F401

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A page that is killed cannot say goodbye."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(0)


def _told(work: Callable[[Any], T], asked: Any) -> tuple[T | None, list[Problem]]:
    """The answer, or the problems as data: this is the edge of a process, and an exception may not travel well."""
    try:
        return work(asked), []
    except LorasmithError as error:
        return None, error.problems
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        what = f"no plan could be made: {type(error).__name__}, {first_line(error)}"
        return None, [Problem("planner", what, "Please report this, with what `lorasmith doctor` says.")]


def _plan(values: dict[str, Any]) -> Planned:
    from ..trainer.plan import make_plan, style_of

    plan = make_plan(validate(values, SOURCE))
    captions = list(dict.fromkeys(example.caption for example in style_of(plan.examples) if example.caption))
    stride = max(1, len(captions) // _CAPTIONS)
    return Planned(plan.facts(), to_toml(plan.config, comments=False), tuple(captions[::stride][:_CAPTIONS]))


def _recognise(model: str) -> Recognised:
    from ..trainer.bases import inspect_base

    info = inspect_base(model)
    return Recognised(model, info.family, info.prediction, info.resolution)

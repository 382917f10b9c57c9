"""The bench: one side alone, or two in rounds that alternate, and what comes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ..config import RunConfig
from ..errors import ConfigError, UserError
from ..events import Phase
from ..loop import Emit
from ..plan import check_devices
from ..precision import DTYPES, mixed_precision
from .case import Case, Protocol, base_and_side, is_among, make_pictures, refuse
from .figures import Clock, Laps, Ratio, in_turn, spread
from .machine import machine
from .ours import Ours
from .peaks import MIB
from .reference import Reference
from .work import Work, work_of
from .worker import Block, Finished, Make, Started, Worker, new_processes

OURS = "ours"
_PROCESS = 2**29
"""Bytes that a process takes before it has any weights, about."""
_OF_BOTH_SIDES = ("base", "budget")


@dataclass(frozen=True)
class Against:
    """The other side: the plain loop, or our trainer with other settings."""

    name: str
    overrides: tuple[str, ...] = ()
    """Laid over those of the case."""

    @property
    def is_reference(self) -> bool:
        return not self.overrides


REFERENCE = Against("reference")


def settings_against(overrides: Sequence[str]) -> Against:
    """Our own trainer with these settings laid over.

    Raises:
        ConfigError: for one that would let the two sides train different pictures.
    """
    refuse(overrides, _OF_BOTH_SIDES, "--against-set", "has to be the same on both sides")
    return Against(" ".join(overrides), tuple(overrides))


@dataclass(frozen=True)
class Measured:
    """What was seen of one side."""

    name: str
    started: Started
    rounds: list[Laps]
    finished: Finished
    warnings: list[str]

    def facts(self, work: Work, images: int, matmul: float) -> dict[str, Any]:
        """For machines; `images` are those of a step, `matmul` is the device's peak in TFLOP a second."""
        wall, cpu = spread(self.rounds, "wall"), spread(self.rounds, "cpu")
        of_the_peak = cpu.median if self.started.on_cpu else wall.median
        training, reserved = self.finished.training, self.finished.reserved
        return {
            "s_per_step": wall.median,
            "cpu_s_per_step": cpu.median,
            "images_per_s": images / wall.median,
            "peak_memory_mib": self.finished.peak / MIB,
            "training_memory_mib": None if training is None else training / MIB,
            "reserved_memory_mib": None if reserved is None else reserved / MIB,
            "model_tflop_per_image": work.tflop,
            "mfu": work.tflop * images / of_the_peak / matmul,
            "s_to_first_step": self.started.seconds,
            "spreads": {
                "s_per_step": [wall.least, wall.most],
                "cpu_s_per_step": [cpu.least, cpu.most],
            },
            "warnings": self.warnings,
        }


@dataclass(frozen=True)
class Result:
    """What came of it."""

    case: Case
    protocol: Protocol
    config: RunConfig
    side: int
    """Of the pictures, in pixels."""
    work: Work
    ours: Measured
    other: Measured | None = None

    @property
    def on_cpu(self) -> bool:
        return self.ours.started.on_cpu

    @property
    def clock(self) -> Clock:
        """By which sides are judged: on a CPU by the time of their processes, which neighbours do not lengthen."""
        return "cpu" if self.on_cpu else "wall"

    @property
    def images(self) -> int:
        """Of a step."""
        return self.config.budget.batch * self.config.budget.accumulate

    @property
    def matmul(self) -> float:
        """The most that either process has reached, in TFLOP a second."""
        return max(side.finished.matmul for side in (self.ours, self.other) if side)

    def ratio(self, clock: Clock) -> Ratio:
        """Of a result with two sides."""
        assert self.other
        return Ratio.of(self.ours.rounds, self.other.rounds, clock)

    def facts(self) -> dict[str, Any]:
        """For `--json`: figures of ours, and with another side its own, and the ratios."""
        mine = self.ours.facts(self.work, self.images, self.matmul)
        return mine | (self._compared(mine) if self.other else {}) | self._conditions()

    def _compared(self, mine: dict[str, Any]) -> dict[str, Any]:
        assert self.other
        theirs = self.other.facts(self.work, self.images, self.matmul)
        found: dict[str, Any] = {"against": self.other.name, "other": theirs}
        for clock in ("cpu", "wall"):
            ratio = self.ratio(clock)
            found |= {f"{clock}_ratio_median": ratio.median, f"{clock}_ratio_worst": ratio.worst}
            found |= {f"{clock}_ratio_rounds": list(ratio.rounds)}
        for key in ("peak_memory", "training_memory"):
            both = mine[f"{key}_mib"], theirs[f"{key}_mib"]
            found[f"{key}_ratio"] = None if None in both else both[0] / both[1]
        return found

    def _conditions(self) -> dict[str, Any]:
        adapter, started = self.config.adapter, self.ours.started
        return {
            "settings": {
                "base": self.config.base.model,
                "resolution": self.side,
                "batch": self.config.budget.batch,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "targets": adapter.targets,
                "precision": precision_of(self.config),
                "set": list(self.case.overrides),
                "threads": started.threads,
            },
            "protocol": asdict(self.protocol)
            | {"steps": self.protocol.kept(started.on_cpu), "enough_for_a_claim": self.protocol.is_enough},
            "work": asdict(self.work) | {"matmul_tflop_per_s": self.matmul},
            "machine": machine() | {"device": started.device},
        }


def measure(
    case: Case, against: Against | None, protocol: Protocol, tell: Emit, processes: Any | None = None
) -> Result:
    """Measure our trainer, alone or against another side; `tell` hears what is being done, `processes` is how they are
    started.

    Raises:
        UserError: if a setting is wrong, or the computer's memory does not hold both sides.
        TrainingError: if a side fails.
    """
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-", ignore_cleanup_errors=True) as folder:
        tell(Phase("counting"))
        config = case.config(Path(folder), OURS, protocol.most())
        sides: list[tuple[str, Make, RunConfig]] = [(OURS, Ours, config)]
        if against:
            sides.append((against.name, *_other(case, against, Path(folder), protocol)))
        for _, _, checked in sides:
            check_devices(checked)
        base, side = base_and_side(config)
        work = work_of(base, config, side)
        make_pictures(config, side)
        require_room(len(sides) * _least_of(config, work), "the weights of all sides take at least", case.base)
        measured = _measured(sides, protocol, tell, processes or new_processes())
        return Result(case, protocol, config, side, work, *measured)


def _other(case: Case, against: Against, folder: Path, protocol: Protocol) -> tuple[Make, RunConfig]:
    if against.is_reference:
        others = [override for override in case.overrides if not is_among(override, ("runtime",))]
        for override in others:
            what = "would change ours alone, and not the plain loop"
            raise ConfigError(what, f"--set {override}", "Leave it out, or take --against-set instead.")
        return Reference, case.config(folder, "reference", protocol.most())
    laid_over = replace(case, overrides=(*case.overrides, *against.overrides))
    return Ours, laid_over.config(folder, "other", protocol.most())


def _measured(
    sides: Sequence[tuple[str, Make, RunConfig]], protocol: Protocol, tell: Emit, processes: Any
) -> list[Measured]:
    """One after the other is set up, and then they take their rounds in turn: only one of them ever computes."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        started: list[Started] = []
        for name, make, config in sides:
            if started:
                require_room(started[0].peak, "the process of ours took, and another one may take,", config.base.model)
            worker = Worker(name, make, config, protocol.threads, tell, processes)
            workers.append(stack.enter_context(worker))
            started.append(worker.started())
        rounds: dict[str, list[Laps]] = {worker.name: [] for worker in workers}
        block = Block(protocol.warmup, protocol.kept(started[0].on_cpu))
        for number in range(protocol.rounds):
            for worker in in_turn(workers, number):
                tell(Phase(f"round {number + 1} of {protocol.rounds}: {worker.name}"))
                rounds[worker.name].append(worker.take(block))
        tell(Phase("multiplying matrices"))
        return [
            Measured(worker.name, began, rounds[worker.name], worker.finish(), worker.warnings)
            for worker, began in zip(workers, started, strict=True)
        ]


def precision_of(config: RunConfig) -> str:
    """As it is computed in."""
    precision = mixed_precision(config.runtime.precision)
    return "fp32" if precision == "no" else precision


def require_room(needed: int, whose: str, base: str) -> None:
    """Before anything is loaded: a system whose memory is full ends processes without a word. A GPU says so itself.

    Raises:
        UserError: if the computer's memory has not so many bytes free.
    """
    free = psutil.virtual_memory().available
    if needed > free and not torch.accelerator.is_available():
        what = f"{whose} {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the computer's memory are free"
        raise UserError(what, f"--base {base}", "End what else uses memory, or measure one side alone.")


def _least_of(config: RunConfig, work: Work) -> int:
    """Bytes that a process has to hold at the least: the weights in their precision."""
    return work.weights * DTYPES[mixed_precision(config.runtime.precision)].itemsize + _PROCESS

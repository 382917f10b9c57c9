"""One run from its plan to a verified file: train or resume, then export; the run folder tells the truth throughout."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .adapter import load_adapter_state, put_on
from .checkpoint import Checkpoint, load_checkpoint
from .config import RunConfig
from .configfile import read_toml, validate, write_config
from .errors import INTERRUPTED, LorasmithError, RunError, TrainingError, UserError
from .events import Done, Event, EventLog, Failed, Phase, Stopped
from .export import Precision
from .jobs import RunFolder, create_run, open_run
from .keys import Format
from .loop import Emit, Trainer
from .models import Base, load_base
from .plan import Plan, make_plan
from .publish import publish


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    run: RunFolder
    stopped_by: str
    """Empty if the budget was spent; else `signal` or `stop file`."""
    exports: list[Path]


def train(plan: Plan, listen: Emit) -> Finished:
    """Start a new run and carry it out.

    Raises:
        UserError: if the name is in use, or something is wrong before the first step; then nothing is left behind.
        TrainingError: if the run fails later; the last checkpoint stands.
    """
    run = (
        create_run(plan.config)
        if _is_main_process()
        else RunFolder(Path(plan.config.runs, plan.config.name).absolute())
    )
    try:
        return _carry_out(plan, run, None, listen)
    except UserError:
        if _is_main_process() and not run.saved_steps() and not run.owner_alive():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def resume(run: RunFolder, overrides: Sequence[str], listen: Emit) -> Finished:
    """Continue a run from its newest checkpoint, exactly as if it had not been interrupted.

    Raises:
        RunError: if there is nothing to resume, or images, captions or base have changed.
    """
    config = _config_for_resume(run, overrides)
    plan = make_plan(config)
    saved = run.saved_steps()
    if saved and saved[-1] >= plan.steps and run.status().state == "done":
        raise RunError(
            f"has all of its {plan.steps} steps already",
            str(run.path),
            f"To go on, raise the budget: lorasmith resume {run.path} --set budget.images={2 * plan.images}",
        )
    checkpoint = load_checkpoint(run.checkpoint(saved[-1])) if saved else None
    return _carry_out(plan, run, checkpoint, listen)


def load_run(path: Path, step: int | None) -> tuple[RunFolder, Plan, Base, int]:
    """A run's base with the adapters of a checkpoint on it; `step` None is the newest.

    Raises:
        RunError: if there is no such checkpoint.
    """
    run = open_run(path)
    saved = run.saved_steps()
    if not saved or (step is not None and step not in saved):
        there = ", ".join(map(str, saved)) or "none"
        raise RunError(
            f"has no checkpoint of step {step}" if saved else "has no checkpoint yet",
            str(run.path),
            f"Checkpoints: {there}.",
        )
    chosen = saved[-1] if step is None else step
    plan = make_plan(run.read_config())
    base = load_base(plan.base, device="cuda" if torch.cuda.is_available() else "cpu")
    put_on(base, plan.config.adapter, plan.config.seed)
    load_adapter_state(base, load_checkpoint(run.checkpoint(chosen)).adapter)
    return run, plan, base, chosen


def export_run(
    path: Path, step: int | None, formats: Sequence[Format], folder: Path | None, precision: Precision
) -> list[Path]:
    """Write and verify the files of one checkpoint; returns the `.safetensors` paths."""
    run, plan, base, chosen = load_run(path, step)
    name = plan.config.name if step is None else f"{plan.config.name}-step{chosen:06d}"
    return publish(base, plan, run, chosen, name, folder or run.exports, formats, precision)


# ---------------------------------------------------------------------------------------------------------------------


def _carry_out(plan: Plan, run: RunFolder, checkpoint: Checkpoint | None, listen: Emit) -> Finished:
    main = _is_main_process()
    if main:
        run.take_ownership()
        write_config(plan.config, run.config)
    log = EventLog(run.events) if main else None

    def emit(event: Event) -> None:
        if log:
            log.append(event)
            listen(event)

    try:
        with stop_on_signals() as was_interrupted:
            trainer = Trainer(plan, run, emit, checkpoint)
            outcome = trainer.train(lambda: was_interrupted() or run.stop_file.exists())
            exports: list[Path] = []
            if outcome == "stopped":
                emit(Stopped(trainer.state.step))
            elif main:
                emit(Phase("exporting and verifying"))
                exports = publish(trainer.base, plan, run, trainer.state.step, plan.config.name, run.exports)
                emit(Done(trainer.state.step, [path.relative_to(run.path).as_posix() for path in exports]))
        trainer.accelerator.end_training()
        by = "" if outcome == "finished" else "signal" if was_interrupted() else "stop file"
        return Finished(run, by, exports)
    except torch.OutOfMemoryError as error:
        failure = TrainingError(
            "the GPU's memory is full",
            str(run.path),
            "Lower budget.batch (and raise budget.accumulate), or set "
            "runtime.gradient_checkpointing = true; then resume.",
        )
        emit(Failed(str(failure)))
        raise failure from error
    except UserError:
        raise  # nothing was begun, so the run stands where it stood
    except Exception as error:
        emit(Failed(str(error) if isinstance(error, LorasmithError) else f"{type(error).__name__}: {error}"))
        raise
    finally:
        if main:
            run.stop_file.unlink(missing_ok=True)
            run.give_up_ownership()


def _config_for_resume(run: RunFolder, overrides: Sequence[str]) -> RunConfig:
    before = run.read_config()
    after = validate(read_toml(run.config), run.config.name, overrides)
    changed = _changes(before.model_dump(), after.model_dump())
    refused = [key for key in changed if not key.startswith(("budget.images", "save.", "sample.", "runtime."))]
    if refused:
        raise RunError(
            f"{', '.join(refused)} cannot change within a run",
            str(run.path),
            "Only budget.images, save, sample and runtime can; for anything else start a new run.",
        )
    return after


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    changed: list[str] = []
    for key in before:
        if isinstance(before[key], dict):
            changed += _changes(before[key], after[key], f"{prefix}{key}.")
        elif before[key] != after[key]:
            changed.append(prefix + key)
    return changed


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C (or SIGTERM) asks to stop and save; the second ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del number, frame
        if asked:
            raise SystemExit(INTERRUPTED)
        asked = True

    signals = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"

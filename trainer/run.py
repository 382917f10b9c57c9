"""One run from its plan to a verified file: train or resume, then export; the run folder tells the truth throughout."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .adapter import load_adapter_state, trained_layers
from .checkpoint import Checkpoint, load_checkpoint
from .config import RunConfig
from .configfile import read_toml, validate, write_config
from .errors import INTERRUPTED, LorasmithError, RunError, TrainingError, UserError
from .events import Done, Event, EventLog, Failed, Phase, Stopped
from .export import Precision
from .fitting import put_on
from .formats import Format
from .jobs import RunFolder, create_run, is_main_process, open_run
from .loop import Emit, Trainer, base_dtype, mixed_precision
from .models import Base, load_base
from .plan import Plan, as_trained, base_of, make_plan
from .release import Trained, release
from .strengths import AS_TRAINED, Strengths


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
        create_run(plan.config) if is_main_process() else RunFolder(Path(plan.config.runs, plan.config.name).absolute())
    )
    try:
        return _carry_out(plan, run, None, listen)
    except UserError:
        if is_main_process() and not run.owner_alive() and run.status().step == 0:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def resume(run: RunFolder, overrides: Sequence[str], listen: Emit) -> Finished:
    """Continue a run from its newest checkpoint, exactly as if it had not been interrupted.

    Raises:
        RunError: if there is nothing to resume, or images, captions or base have changed.
    """
    saved = run.saved_steps()
    plan = make_plan(_changed_config(run, overrides, _MAY_CHANGE, _WHAT_MAY), afresh=not saved)
    checkpoint = load_checkpoint(run.checkpoint(saved[-1])) if saved else None
    seen = checkpoint.state.images if checkpoint else 0
    if seen > plan.images or (seen == plan.images and run.status().state == "done"):
        raise RunError(
            f"has seen {seen} images already, and budget.images is {plan.config.budget.images}",
            str(run.path),
            f"To go on, raise the budget: lorasmith resume {run.path} --set budget.images={2 * seen}",
        )
    return _carry_out(plan, run, checkpoint, listen)


def load_run(path: Path, step: int | None) -> Trained:
    """A run's base with what a checkpoint trained of it; `step` None is the newest. The images are not needed.

    Raises:
        RunError: if there is no such checkpoint, or it is a part of a model whose rest has changed.
    """
    run = open_run(path)
    config, checkpoint = run.read_config(), load_checkpoint(run.checkpoint(saved_step(run, step)))
    base = base_to_load(run, config, checkpoint.state.base)
    load_adapter_state(base, checkpoint.adapter)
    return Trained(run, config, base, checkpoint.state.step, checkpoint.state.images)


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


def base_to_load(run: RunFolder, config: RunConfig, identity: str) -> Base:
    """A run's base, ready to take the weights of a checkpoint, which was saved on a base of this identity.

    Raises:
        RunError: if they are a part of a model whose rest has changed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    info = as_trained(base_of(config), config)
    if _needs_its_base(config) and identity != info.identity:
        what = "the base model has changed since the run was saved, and a part of the weights would be another's"
        raise RunError(what, str(run.path), "Put the base back as it was.")
    base = load_base(info, base_dtype(config, mixed_precision("auto")), device)
    put_on(base, config.adapter, config.seed, config.block, config.trigger)
    return base


def _needs_its_base(config: RunConfig) -> bool:
    """Whether what was trained means something on the very weights only that it was trained on."""
    adapter = config.adapter
    return adapter.kind not in ("lora", "loha", "lokr") or adapter.init in ("pissa", "olora")


def export_run(
    path: Path,
    step: int | None,
    formats: Sequence[Format],
    folder: Path | None,
    precision: Precision | None = None,
    bake_to: int = 0,
    strengths: Strengths = AS_TRAINED,
    bundle: bool = False,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Write and verify the files of one checkpoint at these strengths, of plain LoRAs of a rank with `bake_to`, and a
    zip of them with `bundle`; returns their paths. What is not given is as the run's `[export]` says, with overrides
    such as `export.author=me` laid over it, this once.

    Raises:
        RunError: if there is no such checkpoint, or another setting is overridden.
        ConfigError: if an override is wrong.
        UserError: if nothing is left of what was trained at these strengths, or it cannot be had at them.
        ExportError: if a file on disk is not the same as the trained model.
    """
    config = _changed_config(open_run(path), overrides, _OF_EXPORTS, "Only export can, now that it is trained.")
    trained = replace(load_run(path, step), config=config)
    strengths.refuse_nothing(trained_layers(trained.base))
    name = trained.config.name if step is None else f"{trained.config.name}-step{trained.step:06d}"
    return release(trained, name, folder or trained.run.exports, formats, precision, bake_to, strengths, bundle)


# ---------------------------------------------------------------------------------------------------------------------


def _carry_out(plan: Plan, run: RunFolder, checkpoint: Checkpoint | None, listen: Emit) -> Finished:
    main = is_main_process()
    if main:
        run.take_ownership()
    log = EventLog(run.events) if main else None

    def emit(event: Event) -> None:
        if log:
            log.append(event)
            listen(event)

    try:
        with stop_on_signals() as was_interrupted:
            # what a person has to correct shows here, before anything is begun: the run stands where it stood
            trainer = Trainer(plan, run, emit, checkpoint)
            if main:
                write_config(plan.config, run.config)
            with _failures_told(run, emit):
                outcome = trainer.train(lambda: was_interrupted() or run.stop_file.exists())
                exports = _finish(trainer, emit) if outcome == "finished" and main else []
            if outcome == "stopped":
                emit(Stopped(trainer.state.step))
        trainer.accelerator.end_training()
        by = "" if outcome == "finished" else "signal" if was_interrupted() else "stop file"
        return Finished(run, by, exports)
    finally:
        if main:
            run.stop_file.unlink(missing_ok=True)
            run.give_up_ownership()


def _finish(trainer: Trainer, emit: Emit) -> list[Path]:
    """Export what was trained; the run is done when the files on disk are verified."""
    emit(Phase("exporting and verifying"))
    run, state = trainer.run, trainer.state
    trained = Trained(run, trainer.config, trainer.base, state.step, state.images)
    with trainer.as_it_is_used():
        exports = release(trained, trainer.config.name, run.exports)
    emit(Done(state.step, [path.relative_to(run.path).as_posix() for path in exports]))
    return exports


@contextmanager
def _failures_told(run: RunFolder, emit: Emit) -> Iterator[None]:
    """Whatever ends the block before its time is the run's last word."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failure = TrainingError(
            "the GPU's memory is full",
            str(run.path),
            "Lower budget.batch (and raise budget.accumulate), or set runtime.gradient_checkpointing = true; "
            "then start again under another name.",
        )
        emit(Failed(str(failure)))
        raise failure from error
    except OSError as error:  # a full disk, a folder that was unplugged
        failure = TrainingError(
            f"cannot be read or written ({error.strerror or error})",
            str(error.filename or run.path),
            "The last checkpoint stands. Mend it, then: lorasmith resume " + str(run.path),
        )
        emit(Failed(str(failure)))
        raise failure from error
    except Exception as error:
        emit(Failed(str(error) if isinstance(error, LorasmithError) else f"{type(error).__name__}: {error}"))
        raise


def _changed_config(run: RunFolder, overrides: Sequence[str], may: re.Pattern[str], fix: str) -> RunConfig:
    """A run's configuration with settings laid over it, of those that may change."""
    before = run.read_config()
    after = validate(read_toml(run.config), run.config.name, overrides)
    refused = [key for key in _changes(before.model_dump(), after.model_dump()) if not may.match(key)]
    if refused:
        raise RunError(f"{', '.join(refused)} cannot change within a run", str(run.path), fix)
    return after


_OF_EXPORTS = re.compile(r"export\.")
_MAY_CHANGE = re.compile(r"budget\.images|data\.\d+\.path|save\.|sample\.|export\.|runtime\.")
_WHAT_MAY = "Only budget.images, data.path, save, sample, export and runtime can; for anything else start a new run."


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    changed: list[str] = []
    for key, was in before.items():
        now = after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            changed += _changes(was, now, f"{prefix}{key}.")
        elif key in ("data", "block") and isinstance(now, list) and len(was) == len(now):
            tables = [{str(number): table for number, table in enumerate(tables)} for tables in (was, now)]
            changed += _changes(*tables, prefix=f"{key}.")
        elif was != now:
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

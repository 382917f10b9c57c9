"""One run from its plan to a verified file: train or resume, then export; the run folder tells the truth throughout."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from .adapter import load_adapter_state, trained_layers
from .changes import allowed_changes, change_of_schedule, changed_for_export, changed_for_resume, refuse_spent
from .checkpoint import VERSION, Checkpoint, TrainState, load_checkpoint, load_state
from .config import RunConfig
from .configfile import write_config
from .errors import INTERRUPTED, LorasmithError, Mending, Problem, RunError, TakenOverError, TrainingError, UserError
from .events import Done, Event, EventLog, Failed, Phase, Stopped, Warned
from .export import Precision
from .fitting import put_on
from .formats import Format
from .jobs import RunFolder, create_run, is_main_process, open_run, saved_step
from .loop import Emit, Trainer
from .memory import is_full
from .models import Base, load_base
from .origin import Change
from .plan import Plan, as_trained, base_of, make_plan
from .precision import base_dtype, mixed_precision
from .release import Trained, release
from .sharing.pictures import read_thumbnail
from .story import EXPORTING, Story
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


def resume(
    run: RunFolder,
    overrides: Sequence[str],
    listen: Emit,
    from_step: int | None = None,
    allow: Collection[Change] = (),
) -> Finished:
    """Continue a run from its newest checkpoint, or from that of an earlier step, exactly as if it had not been
    interrupted; a run that has none begins.

    What it is made from must be the same still, but for what `allow` names. With other images or settings it goes on at
    its step, in the order of the images there are now, until it has seen its budget; what it has seen counts.

    Raises:
        RunError: if there is nothing to resume, or settings, images, captions or base have changed.
    """
    begins = from_step is None and not run.saved_steps()
    plan = make_plan(changed_for_resume(run, overrides, allow), afresh=begins)
    checkpoint = None if begins else _load_to_go_on(run, saved_step(run, from_step))
    told: list[str] = []
    if checkpoint:
        told += allowed_changes(run, checkpoint.state, checkpoint.origin, plan.origin, allow)
    refuse_spent(run, plan.config, checkpoint.state.images if checkpoint else 0, plan.images)
    if checkpoint:
        plan = replace(plan, step=checkpoint.state.step, seen=checkpoint.state.images)
        told += change_of_schedule(plan.config.optimizer, checkpoint.state, plan.steps)
    return _carry_out(plan, run, checkpoint, listen, plan.step if from_step is None else None, told)


@contextmanager
def refusals_told(run: RunFolder) -> Iterator[None]:
    """Within the block a run is resumed for those who see its folder only: why it could not go on is its last word."""
    size = EventLog(run.events).size()
    try:
        yield
    except TakenOverError:  # the log is another's now
        raise
    except Exception as error:
        story = Story(run.events)
        story.refresh()
        if not story.ended_since(size) and not run.owner_alive():
            EventLog(run.events).append(_last_word(_explained(error, run, run.read_config()), run, story.step))
        raise


def _load_to_go_on(run: RunFolder, step: int) -> Checkpoint:
    try:
        checkpoint = load_checkpoint(run.checkpoint(step))
    except RunError as error:
        [damage], older = error.problems, [saved for saved in run.saved_steps() if saved < step]
        fix = "There is no earlier one. Remove this folder, and the run starts from the beginning."
        if older:
            fix = f"Go on from step {older[-1]}: lorasmith resume {run.path} --from {older[-1]}"
        raise RunError(damage.what, damage.where, fix, Mending(resume_from=max(older, default=None))) from error
    if (version := checkpoint.state.version) != VERSION:
        what = f"was saved by another version of Lorasmith (in format {version}, and this one goes on from {VERSION})"
        fix = "Go on with that version, or start a new run. What it trained can be drawn and exported here as well."
        raise RunError(what, str(run.checkpoint(step)), fix)
    return checkpoint


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
    thumbnail: Path | None = None,
) -> list[Path]:
    """Write and verify the files of one checkpoint at these strengths, of plain LoRAs of a rank with `bake_to`, and a
    zip of them with `bundle`; returns their paths. What is not given is as the run's `[export]` says, with overrides
    such as `export.author=me` laid over it, this once. `thumbnail` is a picture to stand for them, in place of the
    first preview.

    Raises:
        RunError: if there is no such checkpoint, or another setting is overridden.
        ConfigError: if an override is wrong.
        UserError: if nothing is left of what was trained at these strengths, or it cannot be had at them; or if the
            thumbnail cannot be read.
        ExportError: if a file on disk is not the same as the trained model.
    """
    run = open_run(path)
    config = changed_for_export(run, overrides)
    which = _step_to_export(run, config, load_state(run.checkpoint(saved_step(run, None)))) if step is None else step
    chosen = read_thumbnail(thumbnail, run.samples(saved_step(run, which))) if thumbnail else None
    trained = replace(load_run(path, which), config=config)
    strengths.refuse_nothing(trained_layers(trained.base))
    name = trained.config.name if step is None else f"{trained.config.name}-step{trained.step:06d}"
    return release(trained, name, folder or run.exports, formats, precision, bake_to, strengths, bundle, chosen)


# ---------------------------------------------------------------------------------------------------------------------


def _carry_out(
    plan: Plan,
    run: RunFolder,
    checkpoint: Checkpoint | None,
    listen: Emit,
    newest: int | None = None,
    told: Sequence[str] = (),
) -> Finished:
    """Train from a checkpoint; where that was the `newest` one, it must be so still. `told` are warnings."""
    main = is_main_process()
    if main:
        run.take_ownership()
        if newest is not None and newest != max(run.saved_steps(), default=0):  # the process before has saved meanwhile
            run.give_up_ownership()
            raise RunError("has gone on meanwhile", str(run.path), f"Resume it again: lorasmith resume {run.path}")
    log = EventLog(run.events) if main else None

    def emit(event: Event) -> None:
        if log:
            run.hold_ownership()
            log.append(event)
            listen(event)

    try:
        with stop_on_signals() as was_interrupted:
            trainer = _made_ready(plan, run, emit, checkpoint)
            if main:
                write_config(plan.config, run.config)
                run.set_aside_checkpoints(after=trainer.state.step)
            for message in told:
                emit(Warned(message))
            with _failures_told(trainer):
                outcome = trainer.train(lambda: was_interrupted() or run.request("stop").exists())
                exports = _finish(trainer, emit) if outcome == "finished" and main else []
            if outcome == "stopped":
                emit(Stopped(trainer.state.step))
        trainer.accelerator.end_training()
        by = "" if outcome == "finished" else "signal" if was_interrupted() else "stop file"
        return Finished(run, by, exports)
    finally:
        if main:
            run.give_up_ownership()


def _made_ready(plan: Plan, run: RunFolder, emit: Emit, checkpoint: Checkpoint | None) -> Trainer:
    """What a person has to correct shows here, before anything is begun: the run stands where it stood. A full memory
    or disk is the run's last word."""
    try:
        return Trainer(plan, run, emit, checkpoint)
    except Exception as error:
        failure = _explained(error, run, plan.config, plan.processes)
        if failure is error:
            raise
        with suppress(OSError):  # a disk that is full may take not even that
            emit(_last_word(failure, run, checkpoint.state.step if checkpoint else 0))
        raise failure from error


def _finish(trainer: Trainer, emit: Emit) -> list[Path]:
    """Export what was trained; the run is done when the files on disk are verified."""
    emit(Phase(EXPORTING))
    run, config, state = trainer.run, trainer.config, trainer.state
    step, images = _step_to_export(run, config, state), state.images
    with trainer.as_it_is_used():
        if step != state.step:
            best = load_checkpoint(run.checkpoint(step))
            load_adapter_state(trainer.base, best.adapter)
            images = best.state.images
        exports = release(Trained(run, config, trainer.base, step, images), config.name, run.exports)
    emit(Done(state.step, [path.relative_to(run.path).as_posix() for path in exports], trainer.ended_early))
    return exports


def _step_to_export(run: RunFolder, config: RunConfig, state: TrainState) -> int:
    """The step whose weights the files hold, of a run that stands at this state; the best is a checkpoint that may have
    been removed by hand."""
    is_there = config.export.checkpoint == "best" and state.best_step in run.saved_steps()
    return state.best_step if is_there else state.step


@contextmanager
def _failures_told(trainer: Trainer) -> Iterator[None]:
    """Whatever ends the block before its time is the run's last word."""
    try:
        yield
    except Exception as error:
        failure = _explained(error, trainer.run, trainer.config, trainer.plan.processes)
        with suppress(OSError):  # a disk that is full may take not even that; the failure is raised all the same
            trainer.emit(_last_word(failure, trainer.run, trainer.state.step))
        if failure is error:
            raise
        raise failure from error


def _explained(error: Exception, run: RunFolder, config: RunConfig, processes: int = 1) -> Exception:
    """What a person can do about the memory and the disk; other errors say it themselves."""
    if is_full(error):
        return _memory_is_full(error, run, config, processes)
    if isinstance(error, OSError):  # a full disk, a folder that was unplugged
        mend = "Make room on the disk" if error.errno == errno.ENOSPC else "Mend it"
        return TrainingError(
            f"cannot be read or written ({error.strerror or error})",
            str(error.filename or run.path),
            f"The last checkpoint stands. {mend}, then: lorasmith resume {run.path}",
        )
    return error


def _memory_is_full(error: Exception, run: RunFolder, config: RunConfig, processes: int) -> TrainingError:
    """What is left to do where batches are halved already, down to single images; several processes halve none."""
    whose, budget = "GPU" if isinstance(error, torch.OutOfMemoryError) else "computer", config.budget
    overrides, anew, ways = (), (), []
    if not config.runtime.gradient_checkpointing or config.runtime.checkpointed_blocks:
        more = "checkpointed_blocks=0" if config.runtime.checkpointed_blocks else "gradient_checkpointing=true"
        overrides = (f"runtime.{more}",)
        ways.append(f"Go on with less memory and more time: lorasmith resume {run.path} --set {overrides[0]}.")
    if processes > 1 and budget.batch > 1:
        anew = (f"budget.batch={budget.batch // 2}", f"budget.accumulate={budget.accumulate * 2}")
        ways.append("Where several processes train together, batches are not halved by themselves:")
        ways.append(f"start a new run with smaller ones: {' and '.join(anew)}.")
    ways.append(f"End what else uses the {whose}, or train at a lower data.resolution.")
    return TrainingError(f"the {whose}'s memory is full", str(run.path), " ".join(ways), Mending(overrides, anew))


def _last_word(error: Exception, run: RunFolder, step: int) -> Failed:
    """What is told of an error in the run's own folder, which need not be named there."""
    if not isinstance(error, LorasmithError):
        return Failed(f"{type(error).__name__}: {error}", step)
    told = [
        Problem("" if problem.where == str(run.path) else problem.where, problem.what, "") for problem in error.problems
    ]
    mending = error.mending
    return Failed(
        "; ".join(str(problem).rstrip(". ") for problem in told),
        step,
        " ".join(dict.fromkeys(problem.fix for problem in error.problems if problem.fix)),
        list(mending.overrides),
        list(mending.anew),
        mending.resume_from,
    )


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

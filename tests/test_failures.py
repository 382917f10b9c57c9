"""A run that fails says why, and what would mend it: for a person in words, for a program as settings."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

from lorasmith.trainer import run
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.errors import RunError, TrainingError
from lorasmith.trainer.events import Event, EventLog, Step
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan


def failing(config, error: Exception) -> RunFolder:
    """A run in whose second step something happens that no setting of a test computer can bring about."""

    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            raise error

    with pytest.raises(TrainingError):
        run.train(make_plan(config), listen)
    return RunFolder(Path(config.runs) / config.name)


def test_a_full_gpu_is_mended_by_recomputing(short_run):
    """Smaller batches are taken without asking (test_memory.py)."""
    folder = failing(short_run(save={"every": 1}), torch.OutOfMemoryError("CUDA out of memory"))
    status = folder.status()
    assert (status.state, status.step, status.message) == ("failed", 2, "the GPU's memory is full")
    assert status.sentence == "Failed at step 2: the GPU's memory is full."
    assert status.overrides == ("runtime.gradient_checkpointing=true",)
    assert status.anew == ()
    assert status.overrides[0] in status.fix
    assert status.can_resume

    AcceleratorState._reset_state(reset_partial_state=True)
    run.resume(folder, status.overrides, lambda event: None)
    assert folder.status().state == "done"
    assert folder.read_config().runtime.gradient_checkpointing


def test_where_nothing_is_left_to_set_only_words_are(short_run):
    config = short_run(runtime={"gradient_checkpointing": True}, budget={"batch": 1})
    status = failing(config, torch.OutOfMemoryError("CUDA out of memory")).status()
    assert (status.overrides, status.anew) == ((), ())
    assert status.fix == "End what else uses the GPU, or train at a lower data.resolution."


def test_several_processes_have_to_be_given_smaller_batches(short_run):
    full = torch.OutOfMemoryError("CUDA out of memory")
    told = run._explained(full, RunFolder(Path("runs/short")), short_run(), processes=2)
    assert isinstance(told, TrainingError)
    assert told.mending.anew == ("budget.batch=1", "budget.accumulate=4")
    assert "batches are not halved by themselves" in told.problems[0].fix


@pytest.mark.parametrize(("number", "mend"), [(errno.ENOSPC, "Make room on the disk"), (errno.EIO, "Mend it")])
def test_a_full_or_broken_disk_is_named(short_run, number: int, mend: str):
    folder = failing(short_run(), OSError(number, "no luck", "/disk/file"))
    status = folder.status()
    assert status.message == "/disk/file: cannot be read or written (no luck)"
    assert status.fix == f"The last checkpoint stands. {mend}, then: lorasmith resume {folder.path}"
    assert (status.overrides, status.anew, status.resume_from) == ((), (), None)


@pytest.mark.skipif(os.name == "nt", reason="the size of files cannot be limited on Windows")
def test_a_checkpoint_that_the_disk_does_not_take_is_a_failure_and_not_there(short_run):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with pytest.raises(TrainingError, match="the checkpoint cannot be written"):
            run.train(make_plan(short_run(save={"every": 1})), listen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = RunFolder(Path(short_run().runs) / "short")
    status = folder.status()
    assert (status.state, status.step, status.saved_step) == ("failed", 2, 1)
    assert status.message.startswith(f"{folder.checkpoint(2)}: the checkpoint cannot be written (")
    assert status.fix == f"Make room on the disk, then: lorasmith resume {folder.path}"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]


def test_an_error_of_ours_is_told_with_its_name(short_run):
    def listen(event: Event) -> None:
        if isinstance(event, Step):
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        run.train(make_plan(short_run()), listen)
    status = RunFolder(Path(short_run().runs) / "short").status()
    assert status.message == "ZeroDivisionError: division by zero"


# ---------------------------------------------------------------------------------------------------------------------
# damaged checkpoints


@pytest.fixture
def stopped(short_run) -> RunFolder:
    """A run that stopped at its third step, with checkpoints of all of them, and tells so in its log."""
    plan = make_plan(short_run(save={"every": 1}, budget={"images": 16, "batch": 2, "accumulate": 2}))
    folder = create_run(plan.config)
    log = EventLog(folder.events)
    trainer = Trainer(plan, folder, log.append)
    assert trainer.train(lambda: trainer.state.step == 3) == "stopped"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert folder.saved_steps() == [1, 2, 3]
    return folder


def damage(folder: RunFolder, step: int) -> None:
    file = folder.checkpoint(step) / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def test_of_a_damaged_checkpoint_the_one_before_is_named_and_leads_on(stopped: RunFolder):
    damage(stopped, 3)
    with pytest.raises(RunError) as caught, run.refusals_told(stopped):
        run.resume(stopped, [], lambda event: None)
    [problem] = caught.value.problems
    assert problem.where == str(stopped.checkpoint(3))
    assert problem.fix == f"Go on from step 2: lorasmith resume {stopped.path} --from 2"
    status = stopped.status()
    assert (status.state, status.step, status.resume_from, status.fix) == ("failed", 3, 2, problem.fix)
    assert status.message.startswith(f"{stopped.checkpoint(3)}: cannot be read")

    run.resume(stopped, [], lambda event: None, from_step=status.resume_from)
    assert stopped.status().state == "done"
    assert load_checkpoint(stopped.checkpoint(3)).state.step == 3
    assert (stopped.checkpoints / "step-000003.set-aside").is_dir()


def test_the_only_checkpoint_can_only_be_removed(stopped: RunFolder):
    damage(stopped, 1)
    with pytest.raises(RunError, match="cannot be read") as caught:
        run.resume(stopped, [], lambda event: None, from_step=1)
    assert "There is no earlier one." in caught.value.problems[0].fix
    assert caught.value.mending.resume_from is None
    assert stopped.saved_steps() == [1, 2, 3]
    assert stopped.status().state == "interrupted"


def test_a_step_without_a_checkpoint_cannot_be_gone_on_from(stopped: RunFolder):
    with pytest.raises(RunError, match="has no checkpoint of step 7"):
        run.resume(stopped, [], lambda event: None, from_step=7)


# ---------------------------------------------------------------------------------------------------------------------
# refusals that are told


def test_a_refusal_is_the_last_word_if_nobody_else_hears_it(stopped: RunFolder, pictures: Path):
    pictures.rename(pictures.with_name("elsewhere"))
    with pytest.raises(Exception, match="no such folder"), run.refusals_told(stopped):
        run.resume(stopped, [], lambda event: None)
    status = stopped.status()
    assert (status.state, status.step) == ("failed", 3)
    assert status.message == f"{pictures}: there is no such folder or file"
    assert status.fix
    pictures.with_name("elsewhere").rename(pictures)
    with run.refusals_told(stopped):
        run.resume(stopped, [], lambda event: None)
    assert stopped.status().state == "done"


def test_of_a_run_that_another_process_trains_nothing_is_told(stopped: RunFolder):
    parent = psutil.Process().parent()
    assert parent is not None
    owner = {"pid": parent.pid, "created": parent.create_time()}
    stopped.owner_file.write_text(json.dumps(owner), encoding="utf-8")
    before = stopped.events.read_bytes()
    with pytest.raises(RunError, match="another process is training this run"), run.refusals_told(stopped):
        run.resume(stopped, [], lambda event: None)
    assert stopped.events.read_bytes() == before

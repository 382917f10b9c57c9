"""What a run that trains is asked for meanwhile: a checkpoint, previews, an end; what it learns stays the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasmith.trainer import run
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.events import Checkpointed, Event, Phase, Sampled, Step, Warned
from lorasmith.trainer.jobs import RunFolder, create_run, preview_files
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

BUDGET = {"images": 16, "batch": 2, "accumulate": 2}  # five steps, because batches are of one shape
AT = 2


def trained(config: RunConfig, *asked: str) -> tuple[Trainer, RunFolder, list[Event]]:
    """A run of which these things are asked in its second step."""
    plan, events = make_plan(config), []
    folder = create_run(plan.config)

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.step == AT:
            for what in asked:
                (folder.path / what).touch()

    trainer = Trainer(plan, folder, listen)
    assert trainer.train(lambda: False) == "finished"
    return trainer, folder, events


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"dropout": 0.3}},
        {"optimizer": {"ema_decay": 0.9}},
        {"sample": {"every": 2, "steps": 1, "prompts": ["emoji of owl"]}, "save": {"every": 2}},
    ],
    ids=["dropout", "averages", "where they are due anyway"],
)
def test_requests_are_answered_once_and_change_nothing(short_run, settings):
    plain, _, _ = trained(short_run(name="plain", budget=BUDGET, **settings))
    asked, folder, events = trained(short_run(name="asked", budget=BUDGET, **settings), "save", "sample")

    assert [event.step for event in events if isinstance(event, Sampled) and event.step == AT] == [AT]
    assert [event.step for event in events if isinstance(event, Checkpointed) and event.step == AT] == [AT]
    assert not folder.request("save").exists()
    assert not folder.request("sample").exists()
    weights = adapter_state(plain.base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter_state(asked.base).items())


def test_a_checkpoint_that_was_asked_for_is_one_to_go_on_from(short_run):
    trainer, folder, events = trained(short_run(budget=BUDGET), "save")
    assert folder.saved_steps() == [AT, trainer.plan.steps]
    assert load_checkpoint(folder.checkpoint(AT)).state.step == AT
    place = events.index(Phase("saving"))
    assert events[place + 1] == Checkpointed(AT, f"checkpoints/step-{AT:06d}")


def test_previews_that_were_not_planned_are_of_captions(short_run):
    _, folder, events = trained(short_run(budget=BUDGET, sample={"every": 0, "steps": 1}), "sample")
    [drawn] = [event for event in events if isinstance(event, Sampled)]
    assert drawn.step == AT
    assert len(drawn.prompts) == 4
    assert all(prompt.startswith("trg, emoji of thing") for prompt in drawn.prompts)
    assert len(preview_files(folder.samples(AT))) == 4


def test_without_prompts_and_captions_there_is_nothing_to_draw(short_run, pictures: Path):
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    config = short_run(budget=BUDGET, data=[{"path": str(pictures)}])
    _, folder, events = trained(config, "sample")
    [warned] = [event for event in events if isinstance(event, Warned)]
    assert warned.message.startswith("no previews were drawn: sample.prompts is empty")
    assert not folder.samples(AT).exists()
    assert not folder.request("sample").exists()


def test_what_nobody_answered_is_gone_when_the_run_ends(short_run):
    """A request that comes in the last step is answered by what is done there anyway, or too late."""
    plan = make_plan(short_run())

    def listen(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "exporting and verifying":
            (Path(plan.config.runs) / "short" / "save").touch()

    finished = run.train(plan, listen)
    assert finished.run.status().state == "done"
    assert not finished.run.request("save").exists()


def test_each_step_tells_how_much_memory_is_in_use(short_run):
    _, _, events = trained(short_run())
    assert all(event.memory_mib > 50 for event in events if isinstance(event, Step))


def test_several_processes_answer_as_one(tmp_path: Path, short_run):
    config = short_run(
        adapter={"text_encoder": False},
        budget={"images": 40_000, "batch": 2, "accumulate": 1},
        optimizer={"text_encoder_lr": 0.0},
        sample={"every": 0, "steps": 1},
    )
    (tmp_path / "two.toml").write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "lorasmith.trainer.cli", "train", "two.toml"]
    folder = RunFolder(Path(config.runs) / config.name)
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said
        )
        try:
            _wait(process, lambda: folder.status().step >= 1)
            folder.ask_to_sample()
            folder.ask_to_save()
            _wait(process, lambda: folder.saved_steps() and any((folder.path / "samples").glob("*/00.png")))
            _wait(process, lambda: folder.status().step > folder.saved_steps()[0])
            folder.ask_to_stop()
            assert process.wait(120) == 0, (tmp_path / "said.txt").read_text()
        finally:
            process.kill()
            process.wait()
    assert folder.status().state == "stopped"
    assert len(folder.saved_steps()) == 2


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)

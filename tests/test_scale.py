"""Several processes, started as the shipped files say: they come to what one process comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from torch import Tensor

from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.events import Event, Phase, PlanMade, Step, read_events
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

from . import tiny

FOLDER = Path(str(files("lorasmith.configs").joinpath("accelerate")))


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("one-gpu", 1, 1), ("several-gpus", 1, 2), ("several-machines", 2, 16), ("cpu-2", 1, 2)],
)
def test_accelerate_reads_each_file(name: str, machines: int, processes: int):
    assert {file.stem for file in FOLDER.iterdir()} == {"one-gpu", "several-gpus", "several-machines", "cpu-2"}
    read = ClusterConfig.from_yaml_file(str(FOLDER / f"{name}.yaml"))
    assert (read.num_machines, read.num_processes) == (machines, processes)
    assert read.mixed_precision is None  # else it would contradict runtime.precision


def test_two_processes_come_to_the_same_as_one(short_run, tmp_path: Path):
    """With the same images in each step, losses, gradients and weights agree, those of text encoders too. The three
    shapes of the pictures make batches of two and of one, so that a mean over processes is none over images."""
    weights, its_events = _alone(short_run(**_settings(tmp_path, "alone", accumulate=2)))
    together = _launched(short_run(**_settings(tmp_path, "together", accumulate=1)), tmp_path)
    records = list(read_events(together.events))
    events = [record.event for record in records]

    one, two = ([event for event in told if isinstance(event, Step)] for told in (its_events, events))
    assert [step.images for step in two] == [step.images for step in one] == [3, 7, 10, 14]
    assert [step.loss for step in two] == pytest.approx([step.loss for step in one], rel=1e-4)
    assert [step.grad_norm for step in two] == pytest.approx([step.grad_norm for step in one], rel=1e-3)
    trained = load_checkpoint(together.checkpoint(len(two))).adapter
    assert trained.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5)

    # one process alone has written: it has one plan and one export, and nobody encoded an image again
    assert [type(event) for event in events].count(PlanMade) == 1
    assert together.status().state == "done"
    caches = [
        {file.relative_to(cache): file for cache in [tmp_path / f"cache {name}"] for file in cache.rglob("*.*")}
        for name in ("alone", "together")
    ]
    assert caches[0].keys() == caches[1].keys()
    encoded = max(record.time for record in records if isinstance(record.event, Phase) and record.event.total == 7)
    assert max(file.stat().st_mtime for file in caches[1].values()) < encoded + 0.01


@pytest.mark.exhaustive
@pytest.mark.parametrize("runtime", [{"base_weights": "int8"}, {"compile": True}], ids=["8 bits", "compiled"])
def test_two_processes_do_so_with_what_changes_the_base(runtime: dict[str, Any], short_run, tmp_path: Path):
    """The UNet alone is trained: compiled blocks are those of the UNet."""

    def config(name: str, accumulate: int) -> RunConfig:
        settings = _settings(tmp_path, name, accumulate)
        settings["runtime"] |= runtime
        unet_alone = {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}}
        return short_run(**settings, **unet_alone, base={"model": str(tmp_path / "base")})

    tiny.make_sd1(tmp_path / "base", layers_per_block=1)
    weights, its_events = _alone(config("alone", 2))
    together = _launched(config("together", 1), tmp_path)
    told = [record.event for record in read_events(together.events)]
    one, two = ([event.loss for event in events if isinstance(event, Step)] for events in (its_events, told))
    assert two == pytest.approx(one, rel=1e-4)
    trained = load_checkpoint(together.checkpoint(len(two))).adapter
    for name, tensor in weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5)


def _settings(folder: Path, name: str, accumulate: int) -> dict[str, Any]:
    budget = {"images": 14, "batch": 2, "accumulate": accumulate}
    cache, formats = str(folder / f"cache {name}"), ["kohya"]
    return {"name": name, "budget": budget, "export": {"formats": formats}, "runtime": {"cache": cache}}


def _alone(config: RunConfig) -> tuple[dict[str, Tensor], list[Event]]:
    """The weights that one process comes to, and what happened."""
    plan, events = make_plan(config), []
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.train(lambda: False) == "finished"
    return load_checkpoint(trainer.run.checkpoint(plan.steps)).adapter, events


def _launched(config: RunConfig, folder: Path) -> RunFolder:
    """What two processes have trained together."""
    (folder / "run.toml").write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu-2.yaml")]
    command += ["-m", "lorasmith.trainer.cli", "train", "run.toml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(Path(config.runs, config.name))

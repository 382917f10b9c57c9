"""N + N steps equal 2 N, bit for bit; what would make another run of it is named, and refused unless it is allowed."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lorasmith.trainer import rerun, run
from lorasmith.trainer.checkpoint import VERSION, Checkpoint, load_checkpoint, load_state, open_adapter
from lorasmith.trainer.cli import app
from lorasmith.trainer.config import OptimizerSection, RunConfig, Schedule
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.errors import ConfigError, RunError
from lorasmith.trainer.events import Event, EventLog, Step, Warned, read_events
from lorasmith.trainer.idle import RATE_FREE
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.optim import NAMED, schedule_factor, with_own_betas
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.rehearsal import Trial, check_optimizer

from . import tiny
from .conftest import draw_picture

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A folder with a tiny base of each family that the tests here use."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.make_sd1(folder / "sd1", layers_per_block=1)
    tiny.make_sdxl(folder / "sdxl", layers_per_block=1)
    return folder


@pytest.fixture
def a_run(bases: Path, short_run):
    """A function that gives a short run on a tiny base, by name or path, with data tables laid over the usual one."""

    def make(base: str = "sd1", data: Sequence[Settings] = ({},), **over: Any) -> RunConfig:
        usual = short_run().data[0].model_dump(include={"path", "trigger", "caption_dropout"})
        tables = [usual | table for table in data]
        return short_run(**({"base": {"model": str(bases / base)}, "data": tables} | over))

    return make


# ---------------------------------------------------------------------------------------------------------------------
# N + N = 2 N


LR: Settings = {"lr": 3e-3, "text_encoder_lr": 1e-3}
COMBINATIONS: dict[str, Settings] = {
    "nothing special": {},
    "shuffled tags, mirrored, cropped": {
        "data": [{"flip": True, "shuffle_caption": True, "caption_tag_dropout": 0.3, "crop": "random"}]
    },
    "most captions dropped": {"data": [{"caption_dropout": 0.7}]},
    "accumulation with a remainder": {"budget": {"images": 19, "batch": 3, "accumulate": 3}},
    "buckets of two resolutions": {"data": [{"resolution": [32, 48]}], "budget": {"accumulate": 1}},
    "repeats and half repeats": {"data": [{"weight": 1.5}], "budget": {"batch": 4, "accumulate": 1}},
    "prior preservation": {"data": [{}, {"regularization": True, "prior_loss_weight": 0.5, "trigger": ""}]},
    "masks": {"data": [{"mask": "alpha", "unmasked_weight": 0.1}]},
    "two text encoders": {"base": "sdxl"},
    "two text encoders, one trained alone": {
        "base": "sdxl",
        "adapter": {"train_only": ["unet.mid_block", "text_encoder_2"]},
    },
    "frozen text encoder": {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}},
    "a base in 8 bits": {"runtime": {"base_weights": "int8"}},
    "a base in 4 bits": {"runtime": {"base_weights": "nf4"}},
    "running average": {"optimizer": {"ema_decay": 0.9}},
    "running average, two text encoders, dropout": {
        "base": "sdxl",
        "adapter": {"dropout": 0.3},
        "optimizer": {"ema_decay": 0.9},
    },
    "adapter dropout": {"adapter": {"dropout": 0.3}},
    "adapter dropout, recomputed": {"adapter": {"dropout": 0.3}, "runtime": {"gradient_checkpointing": True}},
    "dora": {"adapter": {"kind": "dora"}},
    "loha with dropout": {"adapter": {"kind": "loha", "rank_dropout": 0.3, "module_dropout": 0.3}},
    "lokr": {"adapter": {"kind": "lokr", "module_dropout": 0.3}},
    "oft": {"adapter": {"kind": "oft", "rank": 16, "alpha": 16.0, "block_size": 4, "module_dropout": 0.3}},
    "boft": {"adapter": {"kind": "boft", "rank": 16, "alpha": 16.0, "block_size": 4}},
    "pissa": {"adapter": {"init": "pissa"}},
    "olora": {"adapter": {"init": "olora"}},
    "eva": {"adapter": {"init": "eva"}},
    "convolutions, blocks, lora+": {
        "adapter": {"targets": "all"},
        "block": [{"path": "unet.mid_block", "rank": 2, "lr": 1e-4}],
        "optimizer": {"loraplus_ratio": 4.0},
    },
    "whole model": {"adapter": {"kind": "full", "rank": 16, "alpha": 16.0}},
    "whole model, averaged": {
        "adapter": {"kind": "full", "rank": 16, "alpha": 16.0, "train_only": ["unet.up_blocks", "text_encoder"]},
        "optimizer": {"ema_decay": 0.9},
    },
    "new tokens": {"adapter": {"new_tokens": 2}},
    "all kinds of noise": {
        "objective": {"noise_offset": 0.1, "multires_noise_iterations": 3, "input_perturbation": 0.1}
    },
    "huber, logit-normal": {"objective": {"loss": "huber", "timesteps": "logit-normal", "weighting": "debiased"}},
    "cosine with restarts": {"optimizer": {"schedule": "cosine-restarts", "schedule_cycles": 2, "warmup": 0.3}},
    "warm-up, stay, decay": {"optimizer": {"schedule": "wsd", "schedule_decay": 0.5}},
    "bf16": {"runtime": {"precision": "bf16"}},
    "adamw with amsgrad": {"optimizer": LR | {"options": {"amsgrad": True}}},
    "adamw8bit": {"optimizer": LR | {"kind": "adamw8bit", "options": {"min_8bit_size": 16}}},
    "lion8bit": {"optimizer": LR | {"kind": "lion8bit", "options": {"min_8bit_size": 16}}},
    "prodigy": {"optimizer": {"kind": "prodigy", "lr": 1.0, "text_encoder_lr": 1.0}},
    "prodigy, averaged": {"optimizer": {"kind": "prodigy", "lr": 1.0, "text_encoder_lr": 1.0, "ema_decay": 0.9}},
    **{
        kind: {"optimizer": LR | {"kind": kind, "schedule": "constant"}}
        for kind in ("adamw-schedulefree", "radam-schedulefree", "sgd-schedulefree", "splus")
    },
    **{kind: {"optimizer": LR | {"kind": kind}} for kind in ("lion", "adafactor", "came", "ademamix", "soap", "sgd")},
    "dadaptadam": {"optimizer": {"kind": "dadaptadam", "lr": 1.0, "text_encoder_lr": 1.0}},
}
"""Settings laid over those of a run of some small steps, each of two batches of at most two of seven pictures, which
lie in three buckets; a fifth of the captions is dropped."""


def trained(config: RunConfig, until: int | None = None) -> tuple[RunFolder, list[Step]]:
    """A run that was carried out, or stopped after a step, and its steps."""
    plan = make_plan(config)
    folder = create_run(plan.config)
    trainer = Trainer(plan, folder, EventLog(folder.events).append)
    trainer.train(lambda: trainer.state.step == until)
    return folder, steps_of(folder)


def gone_on(folder: RunFolder, step: int) -> list[Step]:
    """All steps of a run after it went on from a checkpoint, by the way of the product but for the export."""
    plan, log = make_plan(folder.read_config(), afresh=False), EventLog(folder.events)
    assert Trainer(plan, folder, log.append, checkpoint_of(folder, step)).train(lambda: False) == "finished"
    return steps_of(folder)


def steps_of(folder: RunFolder) -> list[Step]:
    """As they were taken last."""
    taken = {record.event.step: record.event for record in read_events(folder.events) if isinstance(record.event, Step)}
    return list(taken.values())


def checkpoint_of(folder: RunFolder, step: int | None = None) -> Checkpoint:
    return load_checkpoint(folder.checkpoint(folder.saved_steps()[-1] if step is None else step))


def assert_same(mine: Any, theirs: Any, where: str = "") -> None:
    """Equal bit for bit, all the way down."""
    assert type(mine) is type(theirs), where
    if isinstance(mine, Tensor):
        assert mine.dtype == theirs.dtype, where
        assert torch.equal(mine, theirs), f"{where} differs by {(mine.double() - theirs.double()).abs().max()}"
    elif isinstance(mine, Mapping):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            assert_same(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs), where
        for number, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert mine == theirs, where


def assert_same_runs(mine: Checkpoint, theirs: Checkpoint) -> None:
    for part in ("adapter", "trained", "optimizer"):
        assert_same(getattr(mine, part), getattr(theirs, part), part)
    assert mine.state == theirs.state


def told(step: Step) -> tuple[Any, ...]:
    """What a step says of the training, not of the computer."""
    return step.step, step.images, step.loss, step.grad_norm, step.lr


IN_SHORT = {
    *("shuffled tags, mirrored, cropped", "accumulation with a remainder", "buckets of two resolutions", "masks"),
    *("prior preservation", "running average, two text encoders, dropout", "whole model, averaged", "new tokens"),
    *("loha with dropout", "convolutions, blocks, lora+", "adamw8bit", "prodigy", "adamw-schedulefree"),
    "a base in 4 bits",
}
"""What `make test` tries; `make test-all` tries all."""


def in_short(all_of_them: Iterable[str], short: Collection[str]) -> list[Any]:
    return [pytest.param(one, marks=[] if one in short else pytest.mark.exhaustive) for one in all_of_them]


@pytest.mark.parametrize("case", in_short(COMBINATIONS, IN_SHORT))
def test_n_and_n_steps_equal_2_n_bit_for_bit(case: str, a_run, pictures: Path):
    if case == "masks":
        for file in pictures.glob("*.png"):
            with Image.open(file) as picture:
                picture.convert("RGBA").rotate(20).save(file)
    settings = {"budget": {"images": 14}} | COMBINATIONS[case]
    whole, all_steps = trained(a_run(name="whole", **settings))
    half = len(all_steps) // 2
    assert half >= 1

    broken, first = trained(a_run(name="broken", **settings), until=half)
    assert len(first) == half
    both = gone_on(broken, half)
    assert_same_runs(checkpoint_of(broken), checkpoint_of(whole))
    assert list(map(told, both)) == list(map(told, all_steps))
    assert any(not torch.equal(start, end) for start, end in _first_and_last(broken, half))


def _first_and_last(folder: RunFolder, half: int) -> list[tuple[Tensor, Tensor]]:
    """What was trained at the break and at the end: where nothing moves, nothing can go wrong."""
    last, before = checkpoint_of(folder).adapter, checkpoint_of(folder, half).adapter
    return [(before[name], last[name]) for name in last]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_run_that_is_killed_at_any_moment_comes_to_the_same(a_run):
    settings: Settings = {"budget": {"images": 120}, "save": {"every": 5}, "optimizer": {"ema_decay": 0.9}}
    whole, all_steps = trained(a_run(name="whole", **settings))
    broken = RunFolder(whole.path.parent / "broken")
    process = rerun.new_processes().Process(target=_train, args=(a_run(name="broken", **settings),))
    process.start()
    while not broken.saved_steps() and process.is_alive():
        time.sleep(0.01)
    time.sleep(random.random() / 3)  # whatever it does then
    process.kill()
    process.join()
    assert process.exitcode == -9
    killed_at = broken.saved_steps()[-1]
    assert broken.status().state == "interrupted"
    assert 0 < killed_at <= len(all_steps)

    run.resume(broken, [], lambda event: None)
    assert broken.status().state == "done"
    assert_same_runs(checkpoint_of(broken), checkpoint_of(whole))
    assert list(map(told, steps_of(broken))) == list(map(told, all_steps))


def _train(config: RunConfig) -> None:
    torch.set_num_threads(1)
    run.train(make_plan(config), lambda event: None)


@pytest.mark.exhaustive
def test_every_optimizer_that_passes_its_rehearsal_goes_on_exactly_after_any_step(a_run):
    import pytorch_optimizer

    others = [name.lower() for name, thing in vars(pytorch_optimizer).items() if isinstance(thing, type)]
    tried, inexact = 0, []
    for kind in sorted({*NAMED, *others}):
        rate = 1.0 if kind in RATE_FREE else 1e-3
        try:
            check_optimizer(config := a_run(optimizer={"kind": kind, "lr": rate, "text_encoder_lr": rate}))
        except ConfigError:
            continue
        settings, tried = with_own_betas(config.optimizer), tried + 1
        whole = Trial(settings, [rate]).run(30)
        for half in (1, 11, 17):
            resumed = Trial(settings, [rate]).run(half).saved_and_loaded().run(30 - half)
            if any(whole.distances(resumed)):
                inexact.append((kind, half))
    assert inexact == []
    assert tried > 50


# ---------------------------------------------------------------------------------------------------------------------
# a longer run


SCHEDULES: list[Schedule] = ["constant", "linear", "cosine", "cosine-restarts", "polynomial", "rex", "wsd"]


@pytest.mark.parametrize("schedule", in_short(SCHEDULES, {"cosine", "wsd"}))
def test_an_extended_run_follows_the_schedule_of_its_new_length(schedule: Schedule, a_run):
    config = a_run(budget={"images": 12}, optimizer={"schedule": schedule, "warmup": 0.25})
    finished = run.train(make_plan(config), lambda event: None).run
    AcceleratorState._reset_state(reset_partial_state=True)
    steps = finished.status().step

    run.resume(finished, ["budget.images=36"], lambda event: None)
    events = [record.event for record in read_events(finished.events)]
    taken = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in taken] == list(range(1, len(taken) + 1))
    assert taken[-1].images >= 36
    for step in taken:
        length = steps if step.step <= steps else len(taken)
        factor = schedule_factor(config.optimizer, step.step - 1, length)
        assert step.lr["unet"] == pytest.approx(config.optimizer.lr * factor)
    warned = [event.message for event in events if isinstance(event, Warned)]
    told_of_rate = [message for message in warned if "learning rate goes on" in message]
    assert len(told_of_rate) == (schedule not in ("constant", "wsd"))  # wsd has stayed at its full rate so far
    assert all(f"the run has {len(taken)} steps now, and had {steps}" in message for message in told_of_rate)


def test_a_constant_run_that_is_extended_equals_one_that_was_as_long_from_the_start(a_run):
    constant: Settings = {"optimizer": {"schedule": "constant", "warmup": 0.0}}
    whole, _ = trained(a_run(name="whole", budget={"images": 28}, **constant))
    short, _ = trained(a_run(name="short", budget={"images": 12}, **constant))
    AcceleratorState._reset_state(reset_partial_state=True)
    run.resume(short, ["budget.images=28"], lambda event: None)
    assert_same_runs(checkpoint_of(short), checkpoint_of(whole))


def test_before_its_fall_warm_up_stay_decay_is_extended_exactly(a_run):
    falling: Settings = {"optimizer": {"schedule": "wsd", "schedule_decay": 0.5, "warmup": 0.0}, "save": {"every": 1}}
    whole, _ = trained(a_run(name="whole", budget={"images": 32}, **falling))
    short, steps = trained(a_run(name="short", budget={"images": 16}, **falling))
    AcceleratorState._reset_state(reset_partial_state=True)
    run.resume(short, ["budget.images=32"], lambda event: None, from_step=len(steps) // 2)
    assert_same_runs(checkpoint_of(short), checkpoint_of(whole))


# ---------------------------------------------------------------------------------------------------------------------
# what has changed


@pytest.fixture
def stopped(a_run) -> RunFolder:
    """A run of six steps or so that was stopped after its second."""
    folder, _ = trained(a_run(save={"every": 1}, optimizer={"lr": 1e-3}), until=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def edit(folder: RunFolder, old: str, new: str) -> None:
    text = folder.config.read_text(encoding="utf-8")
    assert text.count(old) == 1, text
    folder.config.write_text(text.replace(old, new), encoding="utf-8")


def refusal(folder: RunFolder, *overrides: str, allow: Sequence[Any] = ()) -> dict[str, str]:
    """What is said against a resume, and how it can be done all the same."""
    before = folder.config.read_bytes()
    with pytest.raises(RunError) as caught:
        run.resume(folder, overrides, lambda event: None, allow=allow)
    assert folder.config.read_bytes() == before
    assert not folder.owner_file.exists()
    return {problem.what: problem.fix for problem in caught.value.problems}


def go_on(folder: RunFolder, *overrides: str, allow: Sequence[Any] = ()) -> tuple[list[Step], list[str]]:
    """Steps and warnings of a resume to the end."""
    events: list[Event] = []
    run.resume(folder, overrides, events.append, allow=allow)
    assert folder.status().state == "done"
    AcceleratorState._reset_state(reset_partial_state=True)
    steps = [event for event in events if isinstance(event, Step)]
    return steps, [event.message for event in events if isinstance(event, Warned)]


def test_a_setting_edited_by_hand_is_named_and_refused_unless_it_is_allowed(stopped: RunFolder):
    edit(stopped, "\nlr = 0.001\n", "\nlr = 0.002\n")
    edit(stopped, "weight_decay = 0.01", "weight_decay = 0.5")
    [(what, fix)] = refusal(stopped).items()
    assert "the settings have changed since step 2" in what
    assert "optimizer.lr is 0.002, and was 0.001" in what
    assert "optimizer.weight_decay is 0.5, and was 0.01" in what
    assert fix.endswith(f"lorasmith resume {stopped.path} --allow config")
    assert refusal(stopped, allow=["data", "base"]) == {what: fix}

    steps, warned = go_on(stopped, allow=["config"])
    factor = schedule_factor(OptimizerSection(), 2, checkpoint_of(stopped, 2).state.steps)
    assert steps[0].lr["unet"] == pytest.approx(0.002 * factor)
    assert warned == [f"{what}; this was allowed"]
    groups = checkpoint_of(stopped).optimizer["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}  # and not what was saved with the optimizer
    assert not any("settings" in message for message in go_on(stopped, "budget.images=40")[1])  # they are its own now


def test_an_option_of_the_optimizer_cannot_be_slipped_in(stopped: RunFolder):
    assert "optimizer.options.eps" in next(iter(refusal(stopped, "optimizer.options.eps=0.1")))
    go_on(stopped, "optimizer.options.eps=0.1", allow=["config"])
    groups = checkpoint_of(stopped).optimizer["optimizer"]["param_groups"]
    assert {group["eps"] for group in groups} == {0.1}


def test_another_optimizer_starts_anew_and_a_running_average_begins(stopped: RunFolder):
    edit(stopped, 'kind = "adamw"', 'kind = "sgd"')
    edit(stopped, "ema_decay = 0.0", "ema_decay = 0.5")
    _, warned = go_on(stopped, allow=["config"])
    assert [message for message in warned if message.startswith("sgd starts anew")]
    last = checkpoint_of(stopped)
    assert not torch.equal(*(next(iter(one.values())) for one in (last.adapter, last.trained)))


def test_weights_of_another_shape_do_not_fit_even_if_allowed(stopped: RunFolder):
    edit(stopped, "\nrank = 4\n", "\nrank = 8\n")
    assert "adapter.rank is 8, and was 4" in next(iter(refusal(stopped)))
    with pytest.raises(Exception, match="the saved weights do not fit"):
        run.resume(stopped, [], lambda event: None, allow=["config"])


def test_settings_that_decide_nothing_may_be_edited(stopped: RunFolder, bases: Path, tmp_path: Path):
    edit(stopped, "max_crop = 0.25", "max_crop = 0.5")
    edit(stopped, 'description = ""', 'description = "mine"')
    shutil.copytree(bases / "sd1", tmp_path / "moved")
    edit(stopped, json.dumps(str(bases / "sd1")), json.dumps(str(tmp_path / "moved")))
    assert go_on(stopped)[1] == []


def test_changed_images_are_named(stopped: RunFolder, pictures: Path):
    for number in range(4):
        (pictures / f"picture {number}.txt").write_text("another thing", encoding="utf-8")
    (pictures / "picture 4.png").unlink()
    (pictures / "picture 4.txt").unlink()
    draw_picture(9, (96, 96)).save(pictures / "new.png")
    draw_picture(8, (96, 96)).save(pictures / "picture 6.png")
    (pictures / "mask").mkdir()
    Image.new("L", (80, 150), 200).save(pictures / "mask" / "picture 5.png")
    [(what, fix)] = refusal(stopped).items()
    assert what == (
        "the images or captions have changed since step 2: added: new.png; removed: picture 4.png; "
        "another file: picture 6.png; "
        "another caption: picture 0.png, picture 1.png, picture 2.png and 1 more; another mask: picture 5.png"
    )
    assert fix.endswith(f"lorasmith resume {stopped.path} --allow data")


def test_with_other_images_it_goes_on_at_its_step_until_its_budget_is_seen(stopped: RunFolder, pictures: Path):
    before = checkpoint_of(stopped).state
    for number in (1, 2, 4):
        (pictures / f"picture {number}.png").unlink()
        (pictures / f"picture {number}.txt").unlink()
    steps, warned = go_on(stopped, allow=["data"])
    plan = make_plan(stopped.read_config())
    batches = list(zip(range(before.step + len(steps)), plan.order.steps(plan.batches_per_step), strict=False))
    seen = before.images
    for step, (_, batch) in zip(steps, batches[before.step :], strict=True):
        seen += sum(map(len, batch))
        assert step.images == seen
    assert seen >= 16 > seen - 4
    assert "removed: picture 1.png, picture 2.png, picture 4.png" in warned[0]

    further, warned = go_on(stopped, "budget.images=24")
    assert further[0].step == steps[-1].step + 1
    assert not any("images or captions" in message for message in warned)


def test_other_rules_for_images_are_a_change_of_the_images(stopped: RunFolder):
    edit(stopped, "flip = false", "flip = true")
    [what] = refusal(stopped)
    assert "another crop, flip or colour: picture 0.png, picture 1.png, picture 2.png and 4 more" in what
    edit(stopped, "flip = true", "flip = false")
    assert "data.0.flip" in next(iter(refusal(stopped, "data.flip=true")))
    go_on(stopped, "data.flip=true", allow=["data"])


def test_a_changed_base_is_named(a_run, bases: Path, tmp_path: Path):
    shutil.copytree(bases / "sd1", tmp_path / "base")
    folder, _ = trained(a_run(base=str(tmp_path / "base")), until=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    file = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, {"format": "pt"})
    [(what, fix)] = refusal(folder).items()
    assert what == f"the base model has changed since step 2: other weights lie where {tmp_path / 'base'} was"
    assert fix.endswith(f"lorasmith resume {folder.path} --allow base")

    shutil.copytree(tmp_path / "base", tmp_path / "other")
    edit(folder, json.dumps(str(tmp_path / "base")), json.dumps(str(tmp_path / "other")))
    [what] = refusal(folder)
    assert f'base.model is "{tmp_path / "other"}", and was "{tmp_path / "base"}"' in what
    assert what in go_on(folder, allow=["base"])[1][0]
    assert checkpoint_of(folder).state.base != checkpoint_of(folder, 2).state.base


def test_a_base_that_predicts_something_else_now_is_a_change(a_run, bases: Path, tmp_path: Path):
    shutil.copytree(bases / "sd1", tmp_path / "base")
    folder, _ = trained(a_run(base=str(tmp_path / "base")), until=2)
    scheduler = tmp_path / "base/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text(encoding="utf-8").replace("epsilon", "v_prediction"), encoding="utf-8")
    [what] = refusal(folder)
    assert 'objective.prediction is "v_prediction", and was "epsilon"' in what


def test_all_changes_are_told_at_once_and_one_command_allows_them(stopped: RunFolder, pictures: Path):
    edit(stopped, "\nseed = 42\n", "\nseed = 43\n")
    (pictures / "picture 0.txt").write_text("another thing", encoding="utf-8")
    told_of = refusal(stopped)
    assert len(told_of) == 2
    assert all(fix.endswith("--allow config --allow data") for fix in told_of.values())
    assert len(refusal(stopped, allow=["config"])) == 1
    mistaken = CliRunner().invoke(app, ["resume", str(stopped.path), "--allow", "everything"])
    assert "everything is nothing that can be allowed" in str(mistaken.exception)
    done = CliRunner().invoke(app, ["resume", str(stopped.path), "--allow", "config", "--allow", "data"])
    assert done.exit_code == 0, done.output
    warned = [record.event.message for record in read_events(stopped.events) if isinstance(record.event, Warned)]
    assert any("seed is 43, and was 42" in message for message in warned)


def test_another_number_of_processes_is_a_change(stopped: RunFolder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "processes is 2, and was 1" in next(iter(refusal(stopped)))


# ---------------------------------------------------------------------------------------------------------------------
# damage


FILES = ["adapter.safetensors", "trained.safetensors", "optimizer.pt", "origin.json", "state.json"]


@pytest.fixture
def averaged(a_run) -> RunFolder:
    folder, _ = trained(a_run(save={"every": 1}, optimizer={"ema_decay": 0.9}), until=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def test_damage_is_named_with_the_checkpoint_before(averaged: RunFolder):
    folder = averaged.checkpoint(2)
    assert sorted(FILES) == sorted(path.name for path in folder.iterdir())
    for file in FILES:
        whole = (folder / file).read_bytes()
        place = random.Random(file).randrange(len(whole))
        flipped = bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]])
        for damage in (flipped, whole[: len(whole) // 2], b"", None):
            (folder / file).unlink()
            if damage is not None:
                (folder / file).write_bytes(damage)
            assert_damaged(averaged, folder, file)
        (folder / file).write_bytes(whole)
        load_checkpoint(folder)


def assert_damaged(run_folder: RunFolder, folder: Path, file: str) -> None:
    with pytest.raises(RunError, match="cannot be read") as caught:
        run.resume(run_folder, [], lambda event: None)
    [problem] = caught.value.problems
    assert problem.where == str(folder)
    assert file in problem.what or file == "state.json"
    assert problem.fix == f"Go on from step 1: lorasmith resume {run_folder.path} --from 1"
    assert caught.value.mending.resume_from == 1
    if file in ("adapter.safetensors", "state.json"):
        with pytest.raises(RunError, match="cannot be read"):
            open_adapter(folder)


def test_a_checkpoint_of_an_earlier_version_is_exported_and_not_gone_on_from(stopped: RunFolder, tmp_path: Path):
    folder = stopped.checkpoint(2)
    written = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    old = {key: written[key] for key in ("step", "images", "dataset", "base")} | {"version": 2}
    (folder / "state.json").write_text(json.dumps(old), encoding="utf-8")
    (folder / "origin.json").unlink()
    [(what, fix)] = refusal(stopped).items()
    assert f"in format 2, and this one goes on from {VERSION}" in what
    assert "start a new run" in fix
    assert load_state(folder).at_once == 0  # what it does not tell is as if it had never been
    exported = run.export_run(stopped.path, 2, ["kohya"], tmp_path / "out")
    assert exported[0].is_file()


# ---------------------------------------------------------------------------------------------------------------------
# the proof, for everybody


def test_verify_resume_proves_it_and_leaves_nothing(a_run, tmp_path: Path, monkeypatch):
    config = a_run(optimizer={"ema_decay": 0.9}, adapter={"dropout": 0.3})
    (tmp_path / "mine.toml").write_text(to_toml(config), encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    get_temp_dir()  # where Python's own processes meet, which stays until this one ends
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["verify-resume", str(tmp_path / "mine.toml"), "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["steps"], said["tolerance"], said["equal"]) == (2, 0.0, True)
    rows = {row["what"]: row for row in said["compared"]}
    assert rows.keys() == {
        *("what was trained", "weights behind the average", "optimizer", "running average", "step and images"),
        *("losses", "gradient norms", "learning rates"),
    }
    assert all(row["equal"] and row["largest"] == 0 for row in rows.values())
    assert rows["losses"]["numbers"] == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_what_differs_is_told_with_the_largest_difference(a_run, capsys):
    from lorasmith.trainer.console import print_verdict

    one, steps = trained(a_run(name="one"))
    other, _ = trained(a_run(name="other", optimizer={"weight_decay": 0.5}))
    kinds = [rerun.kinds_of(folder, len(steps)) for folder in (one, other)]
    verdict = rerun.Verdict(2, 0.0, rerun.compared(*kinds))
    rows = {row.what: row for row in verdict.compared}
    assert not verdict.is_equal
    pairs = list(zip(*(checkpoint_of(folder).adapter.values() for folder in (one, other)), strict=True))
    assert rows["what was trained"].largest == max(float((a - b).abs().max()) for a, b in pairs)
    assert rows["what was trained"].numbers == sum(a.numel() for a, _ in pairs)
    assert verdict.holds(rows["step and images"])
    assert not verdict.holds(rows["losses"])
    print_verdict(verdict)
    assert "do not come to the same" in capsys.readouterr().out


def test_what_only_one_has_differs(a_run):
    folder, steps = trained(a_run(name="one"))
    mine = rerun.kinds_of(folder, len(steps))
    theirs = mine | {"losses": {1: 0.5}}
    rows = {row.what: row for row in rerun.compared(mine, theirs)}
    assert rows["losses"].largest == math.inf
    assert json.loads(json.dumps(rerun.Verdict(1, 0.0, list(rows.values())).facts()))["equal"] is False


def test_verify_resume_tells_what_is_wrong_with_a_configuration(a_run, tmp_path: Path):
    config = a_run(data=[{"path": str(tmp_path / "none")}])
    (tmp_path / "mine.toml").write_text(to_toml(config), encoding="utf-8")
    done = CliRunner().invoke(app, ["verify-resume", str(tmp_path / "mine.toml")])
    assert "there is no such folder" in str(done.exception)

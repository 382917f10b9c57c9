"""Averaged weights: they are what is used, training never notices them, and a resumed run has the same."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.averages import Averages
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import OptimizerSection
from lorasmith.trainer.errors import RunError
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.optim import make_optimizer
from lorasmith.trainer.run import load_run
from lorasmith.trainer.sample import draw

from .conftest import trained_run

AVERAGED = {
    "a running average": {"kind": "adamw", "ema_decay": 0.9},
    "schedule-free": {"kind": "adamw-schedulefree", "schedule": "constant"},
    "an average within pytorch-optimizer": {"kind": "splus"},
}


def quadratic(**settings) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, Averages]:
    """A weight of 1000 numbers that is drawn to zero, its optimizer, and their averages."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000).view(20, 50))
    optimizer = make_optimizer(OptimizerSection(**settings), [{"params": [weight], "lr": 1e-2, "name": "unet"}])
    return weight, optimizer, Averages([weight], optimizer, settings.get("ema_decay", 0.0))


def train(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, averages: Averages, steps: int) -> list[Tensor]:
    """The weight after each step."""
    after = []
    for _ in range(steps):
        weight.grad = weight.detach().clone()
        optimizer.step()
        averages.update()
        after.append(weight.detach().clone())
    return after


def same(mine: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("settings", AVERAGED.values(), ids=AVERAGED)
def test_within_the_block_the_weights_are_others_and_after_it_the_very_same(settings):
    weight, optimizer, averages = quadratic(**settings)
    assert averages
    train(weight, optimizer, averages, 5)
    trained = weight.detach().clone()
    with averages.swapped_in():
        assert not torch.equal(weight, trained)
    assert torch.equal(weight, trained)


@pytest.mark.parametrize("settings", AVERAGED.values(), ids=AVERAGED)
def test_looking_at_the_averages_changes_nothing_of_training(settings):
    looked_at, left_alone = quadratic(**settings), quadratic(**settings)
    for _ in range(5):
        train(*looked_at, steps=1)
        with looked_at[2].swapped_in():
            pass
    train(*left_alone, steps=5)
    assert torch.equal(looked_at[0], left_alone[0])


@pytest.mark.parametrize("settings", AVERAGED.values(), ids=AVERAGED)
def test_weights_come_back_after_an_error(settings):
    weight, optimizer, averages = quadratic(**settings)
    (trained,) = train(weight, optimizer, averages, 1)
    with pytest.raises(RuntimeError, match="in between"), averages.swapped_in():
        raise RuntimeError("in between")
    assert torch.equal(weight, trained)
    train(weight, optimizer, averages, 1)  # schedule-free refuses a step while its averages are in


def test_plain_optimizers_have_no_averages_and_keep_no_copies():
    weight, optimizer, averages = quadratic(kind="adamw")
    assert not averages
    train(weight, optimizer, averages, 2)
    with averages.swapped_in():
        storage = weight.data_ptr()
    assert weight.data_ptr() == storage
    assert averages.state_dict() == {}


def test_the_running_average_follows_its_formula():
    weight, optimizer, averages = quadratic(kind="adamw", ema_decay=0.5)
    after = train(weight, optimizer, averages, 20)
    expected = after[0]  # the start counts nothing
    for n, trained in enumerate(after[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * trained
    with averages.swapped_in():
        assert torch.allclose(weight, expected, atol=1e-6)


def test_schedule_free_averages_are_the_optimizers_own():
    from schedulefree import AdamWScheduleFree

    weight, optimizer, averages = quadratic(kind="adamw-schedulefree", weight_decay=0.0)
    other = torch.nn.Parameter(torch.linspace(-1, 1, 1000).view(20, 50))
    plain = AdamWScheduleFree([other], lr=1e-2)
    plain.train()
    for _ in range(5):
        other.grad = other.detach().clone()
        plain.step()
    train(weight, optimizer, averages, 5)
    assert torch.equal(weight, other)
    plain.eval()
    with averages.swapped_in():
        assert torch.equal(weight, other)


@pytest.mark.parametrize("settings", AVERAGED.values(), ids=AVERAGED)
def test_checkpoints_hold_the_averages_and_resume_goes_on_from_the_trained_weights(settings, short_run):
    config = short_run(optimizer=settings, save={"every": 1})
    trainer = trained_run(config)
    folder = trainer.run.checkpoint(trainer.state.step)
    checkpoint = load_checkpoint(folder)

    assert same(checkpoint.trained, adapter_state(trainer.base))
    with trainer.averages.swapped_in():
        assert same(checkpoint.adapter, adapter_state(trainer.base))
    assert not same(checkpoint.trained, checkpoint.adapter)
    assert same(adapter_state(load_run(trainer.run.path, None).base), checkpoint.adapter)

    first = load_checkpoint(trainer.run.checkpoint(1))
    resumed = Trainer(trainer.plan, RunFolder(trainer.run.path), lambda event: None, first)
    assert resumed.train(lambda: False) == "finished"
    again = load_checkpoint(folder)
    assert same(again.trained, checkpoint.trained)
    assert same(again.adapter, checkpoint.adapter)


def test_without_averages_a_checkpoint_holds_the_weights_once(short_run):
    trainer = trained_run(short_run())
    folder = trainer.run.checkpoint(trainer.state.step)
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["adapter.safetensors", "optimizer.pt", "origin.json", "state.json"]


def test_a_checkpoint_that_lost_its_trained_weights_is_damaged(short_run):
    trainer = trained_run(short_run(optimizer={"ema_decay": 0.9}))
    folder = trainer.run.checkpoint(trainer.state.step)
    (folder / "trained.safetensors").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(folder)


def test_previews_show_the_averages(short_run):
    sample = {"every": 1, "steps": 2, "prompts": ["emoji of owl"]}
    trainer = trained_run(short_run(optimizer={"ema_decay": 0.9, "lr": 5e-2}, sample=sample))
    (of_trained,) = draw(trainer.base, sample["prompts"], trainer.drawing)
    with trainer.averages.swapped_in():
        (of_averaged,) = draw(trainer.base, sample["prompts"], trainer.drawing)
    with Image.open(trainer.run.samples(trainer.state.step) / "00.png") as preview:
        assert preview.tobytes() == of_averaged.tobytes()
        assert preview.tobytes() != of_trained.tobytes()


def test_averaging_leaves_training_alone(short_run):
    averaged, plain = trained_run(short_run(optimizer={"ema_decay": 0.9})), trained_run(short_run(name="plain"))
    assert same(adapter_state(averaged.base), adapter_state(plain.base))

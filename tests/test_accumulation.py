"""A step depends on its images alone: not on how they are batched, nor on what came before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.datasets.buckets import Shot
from lorasmith.datasets.dataset import showing
from lorasmith.trainer.adapter import adapter_state, let_drop
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer, drop_captions
from lorasmith.trainer.plan import make_plan

from . import tiny

SQUARE = [Shot(0, 0), Shot(3, 0), Shot(6, 0), Shot(0, 1)]
"""The square ones of the pictures, so that they can share a batch."""
WIDE = [Shot(1, 0), Shot(4, 0)]
EVERYTHING: dict[str, Any] = {
    "noise_offset": 0.1,
    "multires_noise_iterations": 3,
    "input_perturbation": 0.1,
    "timesteps": "logit-normal",
    "loss": "huber",
    "weighting": "soft-min-snr",
}


@pytest.fixture
def a_run(tmp_path: Path, short_run):
    """A function that gives a run on a tiny base."""
    tiny.make_sd1(tmp_path / "base")

    def make(name: str, **over: Any) -> RunConfig:
        data = {"path": str(tmp_path / "pictures"), "trigger": "trg", "caption_dropout": 0.5}
        optimizer = {"lr": 1.0, "text_encoder_lr": 1.0, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
        settings = {"base": {"model": str(tmp_path / "base")}, "data": [data], "optimizer": optimizer}
        return short_run(name=name, **(settings | over))

    return make


def trainer_of(config: RunConfig, accumulate: int) -> Trainer:
    """AdamW's steps are all of one length unless eps is large: with 1 they are as long as the gradients, and no
    difference between these can hide."""
    config = config.model_copy(update={"budget": config.budget.model_copy(update={"accumulate": accumulate})})
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1.0
    return trainer


def changes(config: RunConfig, *steps: list[list[Shot]]) -> dict[str, Tensor]:
    """What some steps, all of as many batches, add to the weights."""
    trainer = trainer_of(config, len(steps[0]))
    before = adapter_state(trainer.base)
    for batches in steps:
        trainer.train_step(batches)
    return {name: tensor - before[name] for name, tensor in adapter_state(trainer.base).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to fp32 rounding: of each tensor's largest change, and of weights, which are below 1."""
    assert found.keys() == expected.keys()
    assert any(tensor.any() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 3e-8, name


@pytest.mark.parametrize(
    "batches",
    [[SQUARE[:2], SQUARE[2:]], [[shot] for shot in SQUARE], [SQUARE[:3], SQUARE[3:]], [SQUARE[:1], SQUARE[1:]]],
    ids=["2 + 2", "1 + 1 + 1 + 1", "3 + 1", "1 + 3"],
)
@pytest.mark.parametrize("objective", [{}, EVERYTHING], ids=["default", "everything"])
def test_accumulated_batches_change_the_weights_as_one_batch_of_all_their_images(objective, batches, a_run):
    whole = changes(a_run("whole", objective=objective), [SQUARE])
    parts = changes(a_run("parts", objective=objective), batches)
    assert_close(parts, whole)


def test_accumulated_batches_of_two_shapes_change_the_weights_in_any_grouping(a_run):
    few = changes(a_run("few"), [SQUARE[:3], WIDE])
    many = changes(a_run("many"), [SQUARE[:2], SQUARE[2:3], WIDE[:1], WIDE[1:]])
    assert_close(many, few)


def test_a_second_step_is_still_the_same(a_run):
    whole = changes(a_run("whole"), [SQUARE], [SQUARE])
    parts = changes(a_run("parts"), [SQUARE[:2], SQUARE[2:]], [SQUARE[:2], SQUARE[2:]])
    assert_close(parts, whole)


def test_the_same_image_draws_anew_at_each_place_and_step(a_run):
    trainer = trainer_of(a_run("places"), 1)
    with torch.no_grad():
        twice = trainer.loss([SQUARE[0], SQUARE[0]], 0, 0)
        second = trainer.loss([SQUARE[0]], 0, 1)
        next_step = trainer.loss([SQUARE[0]], 1, 0)
    assert second.item() == pytest.approx(twice[1].item(), rel=1e-4)
    assert len({round(loss, 4) for loss in [*twice.tolist(), next_step.item()]}) == 3


def test_captions_are_dropped_by_each_images_own_draw(a_run):
    trainer = trainer_of(a_run("captions"), 1)
    shown = [showing(trainer.plan.examples, shot) for shot in SQUARE]
    captions = drop_captions(shown, torch.tensor([0.0, 0.49, 0.5, 0.99]))
    assert captions == ["", "", shown[2].caption, shown[3].caption]


@pytest.mark.parametrize(
    "adapter",
    [{"dropout": 0.5}, {"kind": "loha", "rank_dropout": 0.5}, {"kind": "lokr", "module_dropout": 0.5}],
    ids=["dropout", "rank dropout", "module dropout"],
)
def test_what_adapters_drop_depends_on_the_step_alone(adapter, a_run):
    """Else a resumed run would drop something else than an unbroken one."""
    trainer = trainer_of(a_run("drops", adapter={"rank": 8, "alpha": 8.0} | adapter), 1)
    with torch.no_grad():
        for weights in trainer.trained:
            weights.add_(0.1)  # adapters begin without effect, whatever they drop
        first = trainer.loss(SQUARE, 1, 0)
        torch.rand(3)
        again = trainer.loss(SQUARE, 1, 0)
        let_drop(trainer.base, False)
        whole = trainer.loss(SQUARE, 1, 0)
    assert torch.equal(first, again)
    assert not torch.allclose(first, whole)


def test_a_run_without_dropout_leaves_the_global_generators_alone(a_run):
    trainer = trainer_of(a_run("still"), 1)
    before = torch.get_rng_state()
    trainer.train_step([SQUARE])
    assert torch.equal(torch.get_rng_state(), before)

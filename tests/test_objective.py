"""Every setting of the objective reaches the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.datasets.buckets import Shot
from lorasmith.trainer.config import ObjectiveSection
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

from . import tiny

HUBER, LOGIT_NORMAL = {"loss": "huber"}, {"timesteps": "logit-normal"}
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"weighting": "none"}),
    ({}, {"weighting": "soft-min-snr"}),
    ({}, {"weighting": "debiased"}),
    ({}, {"min_snr_gamma": 1.0}),
    ({}, {"loss": "l1"}),
    ({}, HUBER),
    (HUBER, {"huber_c": 1.0}),
    (HUBER, {"huber_schedule": "constant"}),
    (HUBER, {"huber_schedule": "exponential"}),
    ({}, {"noise_offset": 0.1}),
    ({}, {"multires_noise_iterations": 2}),
    ({"multires_noise_iterations": 2}, {"multires_noise_discount": 0.8}),
    ({}, {"input_perturbation": 0.1}),
    ({}, {"min_timestep": 500}),
    ({}, {"max_timestep": 500}),
    ({}, LOGIT_NORMAL),
    (LOGIT_NORMAL, {"timestep_mean": 1.0}),
    (LOGIT_NORMAL, {"timestep_std": 0.5}),
]
"""Settings, and one more that must change what they give."""
OF_THE_BASE = {"prediction", "zero_terminal_snr"}
SHOTS = [Shot(0, 0), Shot(3, 0), Shot(6, 0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_sd2(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trainer(base: Path, short_run) -> Trainer:
    """Of a tiny base that predicts v."""
    plan = make_plan(short_run(base={"model": str(base)}))
    return Trainer(plan, create_run(plan.config), lambda event: None)


def losses(trainer: Trainer, objective: dict[str, Any]) -> Tensor:
    """Of three images, always with the same seeds."""
    trainer.config = trainer.config.model_copy(update={"objective": ObjectiveSection(**objective)})
    with torch.no_grad():
        return trainer.loss(SHOTS, 0, 0)


def test_every_setting_changes_the_loss(trainer: Trainer):
    idle = [change for given, change in CHANGES if torch.equal(*(losses(trainer, o) for o in (given, given | change)))]
    assert idle == []
    assert {key for _, change in CHANGES for key in change} == set(ObjectiveSection.model_fields) - OF_THE_BASE


def test_every_loss_is_finite_where_the_schedule_ends_in_pure_noise(trainer: Trainer):
    trainer.alphas_cumprod[-1] = 0
    for given, change in CHANGES:
        objective = given | change | {"min_timestep": 999, "max_timestep": 999}
        assert losses(trainer, objective).isfinite().all(), objective

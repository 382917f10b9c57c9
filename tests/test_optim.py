"""The shape of the learning rate, and the optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from lorasmith.trainer.config import OptimizerSection
from lorasmith.trainer.optim import Schedule, make_optimizer, schedule_factor, set_learning_rates


def shape(schedule: Schedule, steps: int, warmup: float = 0.0) -> list[float]:
    return [schedule_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_constant_stays():
    assert shape("constant", 5) == [1.0] * 5


def test_linear_falls_evenly_and_its_last_step_still_changes_something():
    assert shape("linear", 4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_falls_along_a_cosine():
    assert shape("cosine", 4) == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert shape("cosine", 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_evenly_from_above_zero_to_one(schedule: Schedule):
    found = shape(schedule, 20, warmup=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_after_the_warm_up_it_only_falls_and_no_step_is_wasted(schedule: Schedule, warmup: float, steps: int):
    found = shape(schedule, steps, warmup)
    rest = found[round(warmup * steps) :]
    assert rest == sorted(rest, reverse=True)
    assert min(found) > 0
    assert max(found) <= 1


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_one_step_is_taken_at_the_full_rate(schedule: Schedule):
    assert shape(schedule, 1, 0.05) == [1.0]


def test_each_group_gets_its_own_rate_times_the_factor():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.5}]
    optimizer = make_optimizer(OptimizerSection(), groups)
    assert set_learning_rates(optimizer, [1.0, 0.5], 0.25) == [0.25, 0.125]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    assert set_learning_rates(optimizer, [1.0, 0.5], 1.0) == [1.0, 0.5]


def test_groups_and_rates_of_different_number_are_refused():
    optimizer = make_optimizer(OptimizerSection(), [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    with pytest.raises(ValueError, match="zip"):
        set_learning_rates(optimizer, [1.0, 1.0], 1.0)


def test_the_optimizer_is_adamw_with_the_weight_decay_of_the_settings():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer(OptimizerSection(weight_decay=0.5), [{"params": [parameter], "lr": 0.1}])
    assert type(optimizer) is torch.optim.AdamW
    parameter.grad = torch.zeros(1)
    optimizer.step()  # without a gradient, only the decoupled decay acts: 2 * (1 - 0.1 * 0.5)
    assert parameter.item() == pytest.approx(1.9)

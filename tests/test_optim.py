"""The shape of the learning rate, optimizers by name, and what is said of settings that do not fit them."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from lorasmith.trainer.config import OptimizerSection, RunConfig, Schedule
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.optim import (
    effective_rates,
    make_optimizer,
    optimizer_class,
    schedule_factor,
    set_learning_rates,
    warnings_of,
    with_own_betas,
)
from lorasmith.trainer.rehearsal import check_optimizer

FALLING: list[Schedule] = ["linear", "cosine", "polynomial", "rex", "wsd"]
SCHEDULES: list[Schedule] = ["constant", *FALLING, "cosine-restarts"]

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2},
    "adamw8bit": {"lr": 1e-2},
    "lion8bit": {"lr": 3e-3},
    "prodigy": {"lr": 1.0},
    "adamw-schedulefree": {"lr": 1e-2, "schedule": "constant"},
    "radam-schedulefree": {"lr": 3e-2, "schedule": "constant"},
    "sgd-schedulefree": {"lr": 1.0, "schedule": "constant"},
    "lion": {"lr": 3e-3},
    "adafactor": {"lr": 1e-2},
    "came": {"lr": 1e-2},
    "ademamix": {"lr": 1e-2},
    "soap": {"lr": 1e-2},
    "dadaptadam": {"lr": 1.0},
    "sgd": {"lr": 1.0},
}
"""What is trained with each, at rates for a small problem."""


# ---------------------------------------------------------------------------------------------------------------------
# the learning rate


def shape(schedule: Schedule, steps: int, warmup: float = 0.0, **settings: Any) -> list[float]:
    given = OptimizerSection(schedule=schedule, warmup=warmup, **settings)
    return [schedule_factor(given, step, steps) for step in range(steps)]


def test_constant_stays():
    assert shape("constant", 5) == [1.0] * 5


def test_linear_falls_evenly_and_its_last_step_still_changes_something():
    assert shape("linear", 4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_falls_along_a_cosine():
    assert shape("cosine", 4) == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert shape("cosine", 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_cosine_restarts_falls_several_times_and_starts_anew_at_once():
    assert shape("cosine-restarts", 12, schedule_cycles=3) == pytest.approx(3 * shape("cosine", 4))
    assert shape("cosine-restarts", 12, schedule_cycles=1) == shape("cosine", 12)


def test_polynomial_falls_with_its_power():
    assert shape("polynomial", 4, schedule_power=3.0) == [1.0, 0.75**3, 0.5**3, 0.25**3]
    assert shape("polynomial", 4, schedule_power=1.0) == shape("linear", 4)


def test_rex_is_above_a_line_and_falls_late():
    found = shape("rex", 4)
    assert found == pytest.approx([1.0, 0.75 / 0.875, 0.5 / 0.75, 0.25 / 0.625])
    assert all(rex >= line for rex, line in zip(found, shape("linear", 4), strict=True))


def test_wsd_stays_and_then_falls_over_the_last_share_of_all_steps():
    assert shape("wsd", 10, schedule_decay=0.4) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert shape("wsd", 10, warmup=0.2, schedule_decay=0.4)[2:] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert shape("wsd", 4, schedule_decay=1.0) == shape("linear", 4)


@pytest.mark.parametrize("schedule", FALLING)
def test_a_floor_is_where_the_fall_ends(schedule: Schedule):
    high, low = shape(schedule, 1000), shape(schedule, 1000, schedule_floor=0.1)
    assert low == pytest.approx([0.1 + 0.9 * factor for factor in high])
    assert low[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_evenly_from_above_zero_to_one(schedule: Schedule):
    found = shape(schedule, 20, warmup=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_after_the_warm_up_it_only_falls_and_no_step_is_wasted(schedule: Schedule, warmup: float, steps: int):
    found = shape(schedule, steps, warmup)
    rest = found[round(warmup * steps) :]
    assert rest == sorted(rest, reverse=True)
    assert min(found) > 0
    assert max(found) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
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


# ---------------------------------------------------------------------------------------------------------------------
# optimizers


def fit(kind: str, steps: int, **settings: Any) -> tuple[float, float, torch.optim.Optimizer]:
    """The distance of two weights from where they are drawn, before and after some steps; and the optimizer."""
    drawn = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=drawn) for shape in [(64, 64), (8, 4, 3, 3)]]
    weights = [torch.nn.Parameter(torch.zeros_like(target)) for target in targets]
    steady: dict[str, Any] = {"weight_decay": 0.0, "warmup": 0.0}
    given = with_own_betas(OptimizerSection(kind=kind, **steady | settings))
    groups = [{"params": [weight], "lr": given.lr, "name": str(n)} for n, weight in enumerate(weights)]
    optimizer = make_optimizer(given, groups)
    distances = []
    for _ in range(steps + 1):
        errors = [weight.detach() - target for weight, target in zip(weights, targets, strict=True)]
        distances.append(float(sum(error.square().mean() for error in errors)))
        for weight, error in zip(weights, errors, strict=True):
            weight.grad = 2 * error / error.numel() ** 0.5
        optimizer.step()
    assert all(weight.any() for weight in weights)
    return distances[0], distances[-1], optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_solves_a_small_problem(kind: str):
    before, after, _ = fit(kind, 100, **KINDS[kind])
    assert after < 0.7 * before


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_its_rehearsal(kind: str):
    check_optimizer(configured(kind=kind, lr=KINDS[kind]["lr"], text_encoder_lr=KINDS[kind]["lr"]))


def test_the_default_is_adamw_with_the_weight_decay_of_the_settings():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer(OptimizerSection(weight_decay=0.5), [{"params": [parameter], "lr": 0.1}])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    parameter.grad = torch.zeros(1)
    optimizer.step()  # without a gradient, only the decoupled decay acts: 2 * (1 - 0.1 * 0.5)
    assert parameter.item() == pytest.approx(1.9)


@pytest.mark.parametrize("kind", ["lion", "adam", "ademamix", "adamw8bit"])
def test_weight_decay_is_decoupled_from_gradients(kind: str):
    parameter = torch.nn.Parameter(torch.full((64, 64), 2.0))
    optimizer = make_optimizer(OptimizerSection(kind=kind, weight_decay=0.5), [{"params": [parameter], "lr": 0.1}])
    parameter.grad = torch.zeros(64, 64)
    optimizer.step()
    assert parameter[0, 0].item() == pytest.approx(1.9)


def test_settings_reach_the_optimizer():
    given = OptimizerSection(kind="Prodigy", beta1=0.8, beta2=0.95, weight_decay=0.1, options={"d_coef": 0.5})
    optimizer = make_optimizer(given, [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["d_coef"]) == ((0.8, 0.95), 0.1, 0.5)
    assert group["safeguard_warmup"]  # because there is a warm-up
    given = OptimizerSection(kind="came", beta2=0.95)
    optimizer = make_optimizer(given, [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95, 0.9999)  # the third is the optimizer's own


def test_betas_that_were_not_given_are_those_of_the_authors():
    assert with_own_betas(OptimizerSection()).beta2 == 0.999
    lion = with_own_betas(OptimizerSection(kind="lion", beta1=0.95))
    assert (lion.beta1, lion.beta2) == (0.95, 0.99)
    assert with_own_betas(OptimizerSection(kind="lion", beta2=0.999)).beta2 == 0.999


def test_making_prodigy_prints_nothing(capsys):
    fit("prodigy", 1, lr=1.0, weight_decay=0.01)
    assert capsys.readouterr() == ("", "")


def test_the_rate_that_prodigy_found_is_what_is_reported():
    _, _, optimizer = fit("prodigy", 50, lr=1.0)
    assert effective_rates(optimizer) == [group["d"] for group in optimizer.param_groups]
    assert 1e-5 < effective_rates(optimizer)[0] < 1


def test_importing_optimizers_by_name_loads_no_torch():
    code = "import sys; import lorasmith.trainer.rehearsal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# what is said before a run


def configured(adapter: dict[str, Any] | None = None, block: list[dict] | None = None, **optimizer: Any) -> RunConfig:
    data = [{"path": "pictures", "trigger": "trg"}]
    return validate({"name": "a", "data": data, "optimizer": optimizer, "adapter": adapter or {}, "block": block or []})


def problems(config: RunConfig) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config)
    return {problem.where: f"{problem.what}. {problem.fix}" for problem in caught.value.problems}


@pytest.mark.parametrize(("typed", "meant"), [("adamw8bits", "adamw8bit"), ("Prodgy", "prodigy"), ("lyon", "lion")])
def test_a_mistyped_name_is_answered_with_the_likely_one(typed: str, meant: str):
    assert f"Did you mean {meant}?" in problems(configured(kind=typed))["optimizer.kind"]


def test_a_name_like_no_other_is_answered_with_the_known_ones():
    assert "prodigy" in problems(configured(kind="xyzzy"))["optimizer.kind"]


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("adamw8bit", "bitsandbytes.optim"),
        ("prodigy", "prodigyopt"),
        ("adamw-schedulefree", "schedulefree"),
        ("lion", "pytorch_optimizer"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(kind: str, package: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = problems(configured(kind=kind))["optimizer.kind"]
    assert package.partition(".")[0] in said
    assert 'pip install "lorasmith[optimizers]"' in said


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("lbfgs", "parameter groups"),
        ("alig", "closure"),
        ("sam", "base_optimizer"),
        ("lookahead", "takes a whole optimizer"),
        ("adammini", "takes a whole model"),
        ("sophiah", "does not require grad"),  # its second derivatives need the graph
        ("muon", "use_muon"),
        ("gravity", "draws random numbers"),
        ("a2grad", "does not follow the learning rate"),
        ("nero", "does not follow the learning rate"),
        ("adashift", "leaves some weights as they are"),
        ("scalableshampoo", "a checkpoint cannot hold"),
        ("spectralsphere", "2D"),
    ],
)
def test_optimizers_that_cannot_take_part_are_refused_with_the_reason(kind: str, reason: str):
    assert reason in problems(configured(kind=kind))["optimizer.kind"]


def test_one_that_looks_back_too_far_to_ever_begin_is_refused():
    """Rectified Adam waits until it knows the variance of its gradients, which it never does here."""
    said = problems(configured(kind="radam-schedulefree", beta2=0.5, options={"silent_sgd_phase": True}))
    assert "leaves some weights as they are" in said["optimizer.options"]


def test_an_adafactor_that_makes_its_own_rate_is_refused():
    said = problems(configured(kind="adafactor", options={"relative_step": True}))
    assert "does not follow the learning rate" in said["optimizer.options"]


def test_settings_that_an_optimizer_does_not_take_have_no_effect_and_are_refused():
    said = problems(configured(kind="sgd", beta1=0.8, beta2=0.99))
    assert said.keys() == {"optimizer.beta1", "optimizer.beta2"}
    assert "has no effect, because sgd takes no betas" in said["optimizer.beta1"]
    assert problems(configured(kind="sm3", weight_decay=0.1)).keys() == {"optimizer.weight_decay"}


def test_averages_of_averages_are_refused():
    assert problems(configured(kind="adamw-schedulefree", ema_decay=0.9)).keys() == {"optimizer.ema_decay"}


def test_options_are_those_of_the_optimizer():
    said = problems(configured(kind="adamw", options={"amsgard": True, "lr": 1.0, "betas": 0.9, "xyzzy": 1}))
    assert "Did you mean amsgrad?" in said["optimizer.options.amsgard"]
    assert "optimizer.lr" in said["optimizer.options.lr"]
    assert "optimizer.beta1" in said["optimizer.options.betas"]
    assert "eps" in said["optimizer.options.xyzzy"]
    check_optimizer(configured(kind="adamw", options={"amsgrad": True}))


def test_packages_that_swallow_unknown_arguments_do_not_hide_a_mistake():
    said = problems(configured(kind="lion", options={"foreech": True}))
    assert "Did you mean foreach?" in said["optimizer.options.foreech"]


def test_a_value_that_an_option_cannot_have_is_refused():
    assert "fails on a small problem" in problems(configured(kind="prodigy", options={"d0": -1.0}))["optimizer.options"]


@pytest.mark.parametrize("kind", ["prodigy", "dadaptadam"])
def test_optimizers_that_find_their_rate_take_one_for_all(kind: str):
    said = problems(
        configured(
            {"new_tokens": 1},
            [{"path": "unet.mid_block", "lr": 0.5}],
            kind=kind,
            lr=1.0,
            text_encoder_lr=0.5,
            loraplus_ratio=16.0,
        )
    )
    assert said.keys() == {
        "block.0.lr",
        "optimizer.text_encoder_lr",
        "optimizer.token_lr",
        "optimizer.loraplus_ratio",
    }
    assert "Set it to 1." in said["optimizer.text_encoder_lr"]
    check_optimizer(configured({"unet": False}, kind=kind, text_encoder_lr=1.0))


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"kind": "adamw", "lr": 1.0}, "optimizer.lr = 1 is unusual for adamw"),
        ({"kind": "lion", "lr": 1e-3}, "optimizer.lr = 0.001 is unusual for lion"),
        ({"kind": "prodigy", "lr": 1e-4}, "optimizer.lr = 0.0001 is unusual for prodigy: 0.1 to 2 is usual"),
        ({"kind": "adamw", "text_encoder_lr": 0.1}, "optimizer.text_encoder_lr = 0.1"),
        ({"kind": "adamw-schedulefree"}, 'optimizer.schedule = "constant"'),
        ({"kind": "lion", "beta2": 0.999}, "optimizer.beta2 = 0.999 is AdamW's; the authors of lion chose 0.99"),
    ],
)
def test_what_is_seldom_meant_is_warned_of(settings: dict[str, Any], warning: str):
    assert any(warning in told for told in warnings_of(configured(**settings)))


@pytest.mark.parametrize("kind", ["adamw", "prodigy", "adafactor", "came", "adamw8bit"])
def test_the_defaults_warn_of_nothing(kind: str):
    config = configured(kind=kind)
    config.optimizer = with_own_betas(config.optimizer)
    assert list(warnings_of(config)) == []


def test_names_are_read_in_any_case():
    assert optimizer_class("AdamW") is torch.optim.AdamW
    assert optimizer_class("CAME") is optimizer_class("came")

"""Diffusion mathematics against plain scalar versions written out here."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import interpolate

from lorasmith.trainer.config import Loss, ObjectiveSection, Weighting
from lorasmith.trainer.noise import (
    Draws,
    HuberSchedule,
    Prediction,
    add_coarser_noise,
    add_noise,
    derive_seed,
    draw_batch,
    draw_image,
    image_loss,
    loss_weight,
    perturb,
    pseudo_huber,
    sample_logit_normal,
    sample_noise,
    sample_posterior,
    sample_timesteps,
    scheduled_huber_c,
    signal_to_noise,
    target_of,
)

SCHEDULE = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
A = SCHEDULE.alphas_cumprod.float()
ZERO_TERMINAL = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
).alphas_cumprod.float()
TIMES = [0, 1, 10, 250, 500, 750, 998, 999]
PREDICTIONS, WEIGHTINGS, LOSSES = get_args(Prediction), get_args(Weighting), get_args(Loss)
NO_C = torch.ones(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(batch: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    return torch.randn(batch, 4, 3, 2, generator=generator), torch.randn(batch, 4, 3, 2, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# formulas


def test_add_noise_is_the_forward_process_at_each_time():
    x0, eps = latents()
    noisy = add_noise(x0, eps, torch.tensor(TIMES), A)
    for row, time in enumerate(TIMES):
        a = A[time].item()
        expected = [
            math.sqrt(a) * clean + math.sqrt(1 - a) * noise
            for clean, noise in zip(x0[row].flatten().tolist(), eps[row].flatten().tolist(), strict=True)
        ]
        assert noisy[row].flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_add_noise_agrees_with_diffusers():
    x0, eps = latents()
    t = torch.tensor(TIMES)
    torch.testing.assert_close(add_noise(x0, eps, t, A), SCHEDULE.add_noise(x0, eps, t))  # type: ignore[arg-type]


def test_the_epsilon_target_is_the_noise_itself():
    x0, eps = latents()
    assert torch.equal(target_of("epsilon", x0, eps, torch.tensor(TIMES), A), eps)


def test_the_v_target_is_the_papers_formula():
    x0, eps = latents()
    target = target_of("v_prediction", x0, eps, torch.tensor(TIMES), A)
    for row, time in enumerate(TIMES):
        a = A[time].item()
        expected = [
            math.sqrt(a) * noise - math.sqrt(1 - a) * clean
            for clean, noise in zip(x0[row].flatten().tolist(), eps[row].flatten().tolist(), strict=True)
        ]
        assert target[row].flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_v_and_the_noisy_latents_give_back_clean_latents_and_noise():
    x0, eps = latents()
    t = torch.tensor(TIMES)
    noisy, v = add_noise(x0, eps, t, A), target_of("v_prediction", x0, eps, t, A)
    a_t = A[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(a_t.sqrt() * noisy - (1 - a_t).sqrt() * v, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((1 - a_t).sqrt() * noisy + a_t.sqrt() * v, eps, atol=1e-5, rtol=1e-5)


def test_signal_to_noise_is_signal_over_noise():
    found = signal_to_noise(torch.tensor(TIMES), A).tolist()
    assert found == pytest.approx([A[t].item() / (1 - A[t].item()) for t in TIMES], rel=1e-4)
    assert found == sorted(found, reverse=True)


def weight_of(weighting: Weighting, prediction: Prediction, snr: float, gamma: float) -> float:
    """The papers' formulas for one time-step."""
    epsilon = prediction == "epsilon"
    if weighting == "min-snr":
        return min(snr, gamma) / (snr if epsilon else snr + 1)
    if weighting == "soft-min-snr":
        return gamma / (snr + gamma) if epsilon else snr * gamma / ((snr + gamma) * (snr + 1))
    if weighting == "debiased":
        return 1 / math.sqrt(min(snr, 1000)) if epsilon else 1 / (min(snr, 1000) + 1)
    return 1.0


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_the_papers(weighting: Weighting, prediction: Prediction, gamma: float):
    found = loss_weight(weighting, prediction, torch.tensor(TIMES), A, gamma)
    assert found.shape == (len(TIMES),)
    assert found.dtype == torch.float32
    expected = [weight_of(weighting, prediction, A[time].item() / (1 - A[time].item()), gamma) for time in TIMES]
    assert found.tolist() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("weighting", ["min-snr", "soft-min-snr"])
def test_a_weight_of_v_is_that_of_the_same_error_in_epsilon(weighting: Weighting):
    """From x_t, eps = sqrt(1 - a) x_t + sqrt(a) v: both predictions train the same, whichever the model makes."""
    t = torch.tensor(TIMES)
    of_eps, of_v = (loss_weight(weighting, prediction, t, A, 5.0) for prediction in PREDICTIONS)
    torch.testing.assert_close(of_eps * A[t], of_v)


def test_min_snr_leaves_noisy_epsilon_steps_at_weight_1_and_lowers_clean_ones():
    weights = loss_weight("min-snr", "epsilon", torch.tensor([999, 0]), A, 5.0).tolist()
    assert weights[0] == 1.0
    assert 0 < weights[1] < 0.01


def test_soft_min_snr_is_half_of_the_noisiest_weight_at_gamma():
    """Where min-snr has its edge."""
    a = torch.tensor([5 / 6])  # SNR 5
    assert loss_weight("soft-min-snr", "epsilon", torch.tensor([0]), a, 5.0).item() == pytest.approx(0.5)
    assert loss_weight("min-snr", "epsilon", torch.tensor([0]), a, 5.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_debiased_weights_stop_at_a_signal_to_noise_ratio_of_1000(prediction: Prediction):
    limit, beyond, pure = loss_weight(
        "debiased", prediction, torch.arange(3), torch.tensor([1000 / 1001, 0.99999, 1.0]), 5.0
    )
    assert limit.item() == pytest.approx(beyond.item(), rel=1e-3)
    assert beyond == pure > 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_v_are_finite_from_pure_signal_to_pure_noise(weighting: Weighting):
    ends = torch.tensor([1.0, 1 - 6e-8, 0.5, 1e-30, 0.0])
    weights = loss_weight(weighting, "v_prediction", torch.arange(5), ends, 5.0)
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_epsilon_are_finite_at_pure_signal(weighting: Weighting):
    weights = loss_weight(weighting, "epsilon", torch.arange(2), torch.tensor([1.0, 1 - 6e-8]), 5.0)
    assert weights.isfinite().all()


def test_pure_noise_weighs_nothing_with_min_snr_and_most_with_debiased():
    """v at SNR 0 is -x0: min-snr asks for no picture out of pure noise."""
    t = torch.tensor([1, 2])
    schedule = torch.tensor([0.99, 0.5, 0.0])
    assert loss_weight("min-snr", "v_prediction", t, schedule, 5.0).tolist() == [0.5, 0.0]
    assert loss_weight("debiased", "v_prediction", t, schedule, 5.0).tolist() == [0.5, 1.0]


def test_pure_noise_holds_nothing_of_the_picture_and_asks_for_all_of_it():
    x0, eps = latents(2)
    t = torch.tensor([999, 999])
    assert ZERO_TERMINAL[-1] == 0
    assert torch.equal(add_noise(x0, eps, t, ZERO_TERMINAL), eps)
    assert torch.equal(target_of("v_prediction", x0, eps, t, ZERO_TERMINAL), -x0)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def loss_of(loss: Loss, predicted: list[float], target: list[float], c: float, mask: list[float]) -> float:
    """One image's loss, written out."""
    total = 0.0
    for one, other, share in zip(predicted, target, mask, strict=True):
        d = one - other
        error = {"mse": d**2, "l1": abs(d), "huber": 2 * c * (math.sqrt(d**2 + c**2) - c)}[loss]
        total += error * share
    return total / len(predicted)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas_for_each_image(loss: Loss, masked: bool):
    predicted, target = latents(5)
    c = torch.tensor([0.01, 0.1, 0.5, 1.0, 10.0])
    mask = torch.rand(5, 1, 3, 2, generator=seeded(1)) if masked else None
    found = image_loss(loss, predicted, target, c, mask)
    assert found.shape == (5,)
    shares = torch.ones(5, 4, 3, 2) if mask is None else mask.expand(5, 4, 3, 2)
    for row in range(5):
        expected = loss_of(
            loss,
            predicted[row].flatten().tolist(),
            target[row].flatten().tolist(),
            c[row].item(),
            shares[row].flatten().tolist(),
        )
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_of_fp32_whatever_the_model_predicts_in(loss: Loss):
    predicted = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    found = image_loss(loss, predicted, torch.zeros(1, 4, 2, 2), torch.full((1,), 0.5))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx({"mse": 90000.0, "l1": 300.0, "huber": 299.5}[loss], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_prediction_has_no_loss_and_no_gradient(loss: Loss):
    target, _ = latents(2)
    predicted = target.clone().requires_grad_()
    found = image_loss(loss, predicted, target, torch.tensor([0.1, 100.0]))
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0]
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_a_mask_scales_the_loss_and_black_takes_all_of_it():
    predicted, target = latents(1)
    whole, half, none = (
        image_loss("mse", predicted, target, NO_C, torch.full((1, 1, 3, 2), share)).item() for share in (1.0, 0.5, 0.0)
    )
    assert half == pytest.approx(whole / 2)
    assert none == 0


def test_pseudo_huber_is_the_square_below_c_and_the_size_above():
    d, c = torch.tensor([1e-4, -1e-4, 1e3, -1e3]), torch.tensor(0.1)
    small, below, large, above = pseudo_huber(d, c).tolist()
    assert small == below == pytest.approx(1e-8, rel=1e-4)
    assert large == above == pytest.approx(2 * 0.1 * 1e3, rel=1e-3)


def test_pseudo_huber_is_exact_where_errors_are_far_smaller_than_c():
    """As the difference of two nearly equal numbers it would be 0 in fp32."""
    assert pseudo_huber(torch.tensor(1e-3), torch.tensor(100.0)).item() == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("c", [0.001, 0.1, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("schedule", get_args(HuberSchedule))
def test_huber_c_follows_its_schedule(schedule: HuberSchedule, c: float):
    found = scheduled_huber_c(schedule, c, torch.tensor(TIMES), A)
    for at_time, time in zip(found.tolist(), TIMES, strict=True):
        sigma = math.sqrt((1 - A[time].item()) / A[time].item())
        expected = {
            "constant": c,
            "exponential": math.exp(math.log(c) * time / 1000),
            "snr": (1 - c) / (1 + sigma) ** 2 + c,
        }
        assert at_time == pytest.approx(expected[schedule], rel=1e-4)


@pytest.mark.parametrize("schedule", get_args(HuberSchedule))
def test_huber_is_finite_at_pure_noise(schedule: HuberSchedule):
    x0, eps = latents(2)
    t = torch.tensor([0, 999])
    c = scheduled_huber_c(schedule, 0.1, t, ZERO_TERMINAL)
    assert c[1].item() == pytest.approx(0.1, rel=3e-3)
    assert image_loss("huber", x0, eps, c).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# what is random


@pytest.mark.parametrize(
    ("parts", "seed"),
    [((42, 0, 0), 4532473753254589858), ((1, 2, 3), 8064461727618995781)],
    ids=["42 0 0", "1 2 3"],
)
def test_derived_seeds_never_change(parts: tuple[int, ...], seed: int):
    assert derive_seed(*parts) == seed


def test_derived_seeds_differ_by_every_part_and_by_their_order():
    seeds = {derive_seed(seed, step, batch) for seed in range(10) for step in range(10) for batch in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_derived_seeds_fit_a_torch_generator():
    for number in range(200):
        seed = derive_seed(number)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_posterior_samples_have_its_mean_and_spread_times_the_factor():
    mean, std = torch.full((1, 4, 100, 100), 3.0), torch.full((1, 4, 100, 100), 0.5)
    found = sample_posterior(mean, std, 0.2, seeded())
    assert found.mean().item() == pytest.approx(0.6, abs=0.002)
    assert found.std().item() == pytest.approx(0.1, abs=0.002)


def test_a_posterior_without_spread_is_its_mean_times_the_factor():
    mean, _ = latents()
    assert torch.equal(sample_posterior(mean, torch.zeros_like(mean), 0.5, seeded()), mean * 0.5)


def test_noise_is_standard_normal_and_has_the_latents_shape():
    eps = sample_noise(torch.zeros(4, 4, 50, 50), 0, seeded())
    assert eps.shape == (4, 4, 50, 50)
    assert eps.mean().item() == pytest.approx(0, abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)


def test_noise_offset_adds_one_constant_to_each_channel():
    x0 = torch.zeros(3, 4, 8, 8)
    added = sample_noise(x0, 0.5, seeded()) - sample_noise(x0, 0, seeded())
    constants = added[:, :, 0, 0]
    torch.testing.assert_close(added, constants[:, :, None, None].expand_as(added), atol=1e-5, rtol=0)
    assert len({round(value, 4) for value in constants.flatten().tolist()}) == 12


def test_noise_offset_has_the_strength_it_says():
    x0 = torch.zeros(500, 4, 1, 1)
    added = sample_noise(x0, 0.5, seeded()) - sample_noise(x0, 0, seeded())
    assert added.std().item() == pytest.approx(0.5, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# multi-resolution noise


@pytest.mark.parametrize("iterations", [1, 2, 3, 16])
def test_coarser_noise_is_whitakers_sum_of_enlarged_noise(iterations: int):
    """Written out with the same draws."""
    eps, discount = sample_noise(torch.zeros(2, 4, 24, 16), 0, seeded()), 0.6
    found = add_coarser_noise(eps, iterations, discount, seeded(3))

    draws, total = seeded(3), eps
    for i in range(iterations):
        r = 2 + 2 * torch.rand((), generator=draws).item()
        height, width = max(1, int(24 / r**i)), max(1, int(16 / r**i))
        level = torch.randn(2, 4, height, width, generator=draws)
        total = total + discount**i * interpolate(level, (24, 16), mode="bilinear")
        if height == 1 or width == 1:
            break
    for row in range(2):
        torch.testing.assert_close(found[row], total[row] / total[row].std())


def test_coarser_noise_has_unit_deviation_in_each_image():
    eps = sample_noise(torch.zeros(3, 4, 16, 24), 0.3, seeded())
    found = add_coarser_noise(eps, 6, 0.8, seeded(1))
    assert found.shape == eps.shape
    assert found.std((1, 2, 3)).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_coarser_noise_stops_where_a_side_is_1():
    """A side of 24 is 1 after at most five halvings, so more iterations draw nothing more."""
    eps = sample_noise(torch.zeros(1, 4, 24, 24), 0, seeded())
    some, more = seeded(1), seeded(1)
    assert torch.equal(add_coarser_noise(eps, 6, 0.8, some), add_coarser_noise(eps, 16, 0.8, more))
    assert torch.equal(some.get_state(), more.get_state())


def test_coarser_noise_of_the_smallest_latents_is_finite():
    found = add_coarser_noise(torch.randn(1, 4, 1, 1, generator=seeded()), 16, 1.0, seeded(1))
    assert found.isfinite().all()


def test_coarser_noise_has_larger_contrasts_of_areas():
    def contrast(noise: Tensor) -> float:
        return torch.nn.functional.avg_pool2d(noise, 8).std().item()

    eps = sample_noise(torch.zeros(8, 4, 32, 32), 0, seeded())
    mild, strong = (contrast(add_coarser_noise(eps, 6, discount, seeded(1))) for discount in (0.3, 0.8))
    assert contrast(eps) < mild < strong


# ---------------------------------------------------------------------------------------------------------------------
# input perturbation


def test_perturbation_adds_noise_of_its_strength():
    eps = torch.zeros(1, 4, 100, 100)
    assert perturb(eps, 0.1, seeded()).std().item() == pytest.approx(0.1, rel=0.02)


def test_no_perturbation_leaves_noise_and_generator_alone():
    eps, generator = torch.ones(1, 4, 2, 2), seeded(1)
    assert torch.equal(perturb(eps, 0, generator), eps)
    assert torch.equal(generator.get_state(), seeded(1).get_state())


# ---------------------------------------------------------------------------------------------------------------------
# time-steps


def test_timesteps_are_uniform_whole_numbers_and_reach_both_ends():
    found = sample_timesteps(20_000, 0, 9, seeded())
    assert found.dtype == torch.int64
    counts = torch.bincount(found)
    assert len(counts) == 10
    assert counts.min().item() > 1800
    assert counts.max().item() < 2200


def test_timesteps_stay_in_their_range():
    assert sample_timesteps(1000, 200, 203, seeded()).unique().tolist() == [200, 201, 202, 203]
    assert sample_timesteps(10, 999, 999, seeded()).tolist() == [999] * 10


def test_logit_normal_timesteps_are_sigmoids_of_normal_numbers():
    found = sample_logit_normal(50, 100, 899, 0.5, 1.5, seeded())
    normal = torch.randn(50, generator=seeded()).tolist()
    expected = [100 + int(800 / (1 + math.exp(-(0.5 + 1.5 * number)))) for number in normal]
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(("mean", "median"), [(-1.0, 0.2689), (0.0, 0.5), (1.0, 0.7311)])
def test_logit_normal_timesteps_lie_round_the_sigmoid_of_their_mean(mean: float, median: float):
    found = sample_logit_normal(20_000, 0, 999, mean, 1.0, seeded()).float()
    assert found.median().item() == pytest.approx(1000 * median, abs=15)


def test_logit_normal_timesteps_are_the_denser_the_smaller_their_deviation():
    narrow, wide = (sample_logit_normal(5000, 0, 999, 0.0, std, seeded()).float().std() for std in (0.2, 2.0))
    assert narrow < 100 < 300 < wide


def test_logit_normal_timesteps_stay_in_their_range_at_the_extremes():
    for mean in (-5.0, 5.0):
        found = sample_logit_normal(20_000, 10, 19, mean, 5.0, seeded())
        assert found.unique().tolist() == list(range(10, 20))
    assert sample_logit_normal(10, 7, 7, 0.0, 1.0, seeded()).tolist() == [7] * 10


# ---------------------------------------------------------------------------------------------------------------------
# all that is random of an image


ALL_OF_IT: dict[str, Any] = {
    "noise_offset": 0.1,
    "multires_noise_iterations": 4,
    "input_perturbation": 0.1,
    "timesteps": "logit-normal",
}


def drawn(seeds: list[int], std: float = 1.0, **objective: Any) -> Draws:
    mean = torch.arange(len(seeds)).view(-1, 1, 1, 1).expand(-1, 4, 8, 6).float()
    return draw_batch(mean, torch.full_like(mean, std), 0.5, ObjectiveSection(**objective), 1000, seeds)


def same(one: Draws, other: Draws) -> list[bool]:
    return [torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Draws)]


@pytest.mark.parametrize("objective", [{}, ALL_OF_IT], ids=["default", "all of it"])
def test_an_image_draws_the_same_in_any_batch(objective: dict[str, Any]):
    batch = drawn([5, 6, 7], **objective)
    alone = draw_image(
        torch.full((1, 4, 8, 6), 2.0), torch.ones(1, 4, 8, 6), 0.5, ObjectiveSection(**objective), 1000, 7
    )
    third = Draws(*(getattr(batch, field.name)[2:] for field in fields(Draws)))
    assert same(third, alone) == [True] * 5


@pytest.mark.parametrize("objective", [{}, ALL_OF_IT], ids=["default", "all of it"])
def test_what_is_drawn_depends_on_the_seed_alone(objective: dict[str, Any]):
    assert same(drawn([7], **objective), drawn([7], **objective)) == [True] * 5
    assert same(drawn([7], **objective), drawn([8], **objective)) == [False] * 5


def test_draws_have_the_shapes_of_the_batch():
    batch = drawn([1, 2, 3], **ALL_OF_IT)
    assert [tuple(getattr(batch, field.name).shape) for field in fields(Draws)] == [(3,), (3,), *[(3, 4, 8, 6)] * 3]
    assert ((batch.caption >= 0) & (batch.caption < 1)).all()


def test_the_model_is_asked_for_the_noise_that_it_sees_unless_it_is_perturbed():
    plain, perturbed = drawn([1, 2]), drawn([1, 2], input_perturbation=0.5)
    assert torch.equal(plain.shown_eps, plain.eps)
    assert torch.equal(perturbed.eps, plain.eps)
    assert (perturbed.shown_eps - perturbed.eps).std().item() == pytest.approx(0.5, rel=0.1)


def test_settings_of_the_noise_change_no_other_draw():
    plain, other = drawn([1, 2]), drawn([1, 2], noise_offset=0.2, multires_noise_iterations=6, input_perturbation=0.1)
    assert same(plain, other) == [True, True, True, False, False]


def test_latents_come_from_the_posterior():
    assert torch.equal(drawn([1, 2, 3], std=0.0).x0[:, 0, 0, 0], torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("timesteps", ["uniform", "logit-normal"])
def test_drawn_timesteps_are_those_of_the_objective(timesteps: str):
    found = drawn(list(range(200)), timesteps=timesteps, min_timestep=998, max_timestep=999).t
    assert found.unique().tolist() == [998, 999]


def test_drawn_timesteps_end_with_the_schedule():
    mean = torch.zeros(1, 4, 2, 2)
    objective = ObjectiveSection(min_timestep=9)
    assert draw_image(mean, mean, 1.0, objective, 10, 0).t.tolist() == [9]

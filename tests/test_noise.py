"""Diffusion mathematics against plain scalar versions written out here."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lorasmith.trainer.noise import (
    add_noise,
    derive_seed,
    min_snr_weight,
    sample_noise,
    sample_posterior,
    sample_timesteps,
    signal_to_noise,
    target_of,
    weighted_mse,
)

Prediction = Literal["epsilon", "v_prediction"]

SCHEDULE = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
A = SCHEDULE.alphas_cumprod.float()
TIMES = [0, 1, 10, 250, 500, 750, 998, 999]


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


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(prediction: Prediction, gamma: float):
    found = min_snr_weight(prediction, torch.tensor(TIMES), A, gamma).tolist()
    for weight, time in zip(found, TIMES, strict=True):
        snr = A[time].item() / (1 - A[time].item())
        assert weight == pytest.approx(min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1), rel=1e-4)


def test_min_snr_leaves_noisy_epsilon_steps_at_weight_1_and_lowers_clean_ones():
    weights = min_snr_weight("epsilon", torch.tensor([999, 0]), A, 5.0).tolist()
    assert weights[0] == 1.0
    assert 0 < weights[1] < 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_gamma_0_weighs_every_step_the_same(prediction: Prediction):
    weights = min_snr_weight(prediction, torch.tensor(TIMES), A, 0)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1.0] * len(TIMES)


def test_a_v_schedule_that_ends_in_pure_noise_gives_finite_weights():
    zero_terminal = torch.tensor([0.99, 0.5, 0.0])
    assert min_snr_weight("v_prediction", torch.tensor([1, 2]), zero_terminal, 5.0).tolist() == [0.5, 0.0]


def test_weighted_mse_is_the_mean_over_an_image_times_its_weight_in_fp32():
    predicted = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]], dtype=torch.float16)
    target = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    found = weighted_mse(predicted, target, torch.tensor([1.0, 0.5]))
    assert found.dtype == torch.float32
    assert found.tolist() == [2.5, 1.0]


def test_weighted_mse_does_not_overflow_in_half_precision():
    predicted = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert weighted_mse(predicted, torch.zeros(1, 4, 2, 2), torch.ones(1)).tolist() == [90000.0]


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


def test_what_is_drawn_depends_on_the_seed_alone():
    mean = torch.zeros(2, 4, 3, 3)
    draws = [
        (
            sample_posterior(mean, mean + 1, 1.0, seeded(seed)),
            sample_noise(mean, 0.1, seeded(seed)),
            sample_timesteps(16, 1000, seeded(seed)),
        )
        for seed in (7, 7, 8)
    ]
    for first, again, other in zip(*draws, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


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


def test_timesteps_are_whole_numbers_below_the_total_and_reach_both_ends():
    found = sample_timesteps(20_000, 10, seeded())
    assert found.dtype == torch.int64
    counts = torch.bincount(found)
    assert len(counts) == 10
    assert counts.min().item() > 1800
    assert counts.max().item() < 2200

"""Sigmas, noisy latents and loss, held against diffusers' scheduler and the papers' equations."""

import math

import pytest
import torch

from placeholder.training.flow import add_noise, flow_loss, sample_sigma, sigma_grid, velocity_target
from standin.small_base import scheduler


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_schedulers_shift_adds_mu_to_the_logit(mu):
    sigmas = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(torch.sigmoid(torch.logit(sigmas) + mu), scheduler().time_shift(mu, 1.0, sigmas))


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_sampled_sigmas_are_logit_normal_about_the_shift_and_lie_on_the_grid(mu):
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.stack([sample_sigma(mu, generator) for _ in range(4000)])
    grid = sigma_grid()
    assert grid.shape == (1000,) and grid[0] == pytest.approx(0.001) and grid[-1] == 1.0
    assert set(sigmas.tolist()) <= set(grid.tolist())
    logits = torch.logit(sigmas, eps=5e-4)  # the shift adds mu to the logit
    assert logits.mean().item() == pytest.approx(mu, abs=4 / math.sqrt(4000))
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_noisy_latents_and_target_follow_the_straight_path_from_data_to_noise():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 5, 4, generator=generator)
    sigmas = torch.tensor([0.0, 0.25, 1.0])
    noisy = add_noise(latents, noise, sigmas)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    # The target is the path's derivative: moving by it from any point reaches the noise at sigma 1.
    arrived = noisy + (1 - sigmas).view(3, 1, 1) * velocity_target(latents, noise)
    torch.testing.assert_close(arrived, noise)


def test_the_loss_is_the_mean_square_of_each_sample_in_fp32():
    generator = torch.Generator().manual_seed(0)
    model_pred, target = torch.randn(2, 3, 5, 4, generator=generator).bfloat16()
    found = flow_loss(model_pred, target)
    assert found.dtype == torch.float32
    for sample in range(3):
        expected = sum(
            (a - b) ** 2 for a, b in zip(model_pred[sample].flatten().tolist(), target[sample].flatten().tolist(), strict=True)
        )
        assert found[sample].item() == pytest.approx(expected / 20, rel=1e-5)

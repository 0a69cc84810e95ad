"""Sigmas, noisy latents and loss, held against diffusers' scheduler and the papers' equations."""

import math

import pytest
import torch

from placeholder.training.flow import flow_loss, sample_sigma, sigma_grid
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


def test_losses_are_fp32_whatever_the_base_models_dtype():
    prediction, target = torch.randn(2, 3, 5, 4).bfloat16()
    assert flow_loss(prediction, target).dtype == torch.float32
    torch.testing.assert_close(flow_loss(prediction, target), flow_loss(prediction.float(), target.float()), rtol=0, atol=0)

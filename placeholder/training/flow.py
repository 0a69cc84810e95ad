"""Rectified flow matching as Qwen-Image uses it: sigmas, noisy latents, target, loss."""

import torch
from torch import Tensor

# Sigmas are multiples of 1/1000, the 1000 training timesteps of the model's FlowMatchEulerDiscreteScheduler: a fixed set, so
# that what the transformer computes from the timestep alone can be a table (transformer/modulations.py).
TIMESTEPS = 1000
MIDDLE_SIGMA = 0.5  # of predictions that are made to compare


def sample_sigma(mu: float, generator: torch.Generator) -> Tensor:
    """A sigma of `sigma_grid`, shape (): logit-normal(0, 1), shifted for the image's resolution, rounded to the grid.

    Logit-normal is what the Qwen-Image technical report (arXiv:2508.02324, section on pre-training) samples timesteps from.
    The report names no shift; ours is that of the checkpoint's scheduler, so that training visits sigmas as often as
    inference does: diffusers' "exponential" time shift, exp(mu) s / (1 + (exp(mu) - 1) s), adds mu to the logit of s (Esser
    et al. 2024, arXiv:2403.03206, equation 23, with exp(mu) for the square root of the resolution ratio).
    """
    sigma = torch.sigmoid(torch.randn((), generator=generator) + mu)
    return (sigma * TIMESTEPS).round().clamp(1, TIMESTEPS) / TIMESTEPS


def sigma_grid() -> Tensor:
    """Every sigma that a training can sample, (1000,)."""
    return torch.arange(1, TIMESTEPS + 1) / TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma noise, for latents (B, L, D) and sigmas (B,); arXiv:2209.03003, equation 1."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """d x_sigma / d sigma = noise - x_0, what the transformer predicts."""
    return noise - latents


def flow_loss(model_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample in fp32: (B, L, D) => (B,); weighted by token with `weights` (B, L)."""
    errors = (model_pred.float() - target.float()).square()
    if weights is None:
        return errors.flatten(1).mean(dim=1)
    return (errors.mean(dim=2) * weights).sum(dim=1) / weights.sum(dim=1)

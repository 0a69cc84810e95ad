"""Latents between the VAE and the transformer, held against the pipeline."""

import pytest
import torch
from diffusers import QwenImagePipeline

from placeholder.model.vae import normalize, pack, unpack


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (2, 16, 4, 10), (3, 4, 2, 2)])
def test_packing_equals_the_pipelines(shape):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(latents), QwenImagePipeline._pack_latents(latents, *shape))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 5), (1, 1)])
def test_unpacking_equals_the_pipelines(height, width):
    tokens = torch.randn(2, height * width, 64, generator=torch.Generator().manual_seed(0))
    expected = QwenImagePipeline._unpack_latents(tokens, height * 16, width * 16, vae_scale_factor=8)[:, :, 0]
    assert torch.equal(unpack(tokens, height, width), expected)


def test_unpacking_undoes_packing():
    latents = torch.randn(2, 16, 4, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(latents), 2, 5), latents)


def test_normalized_latents_have_the_vaes_mean_and_deviation_taken_out():
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    unit = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    raw = unit * std.view(1, 16, 1, 1) + mean.view(1, 16, 1, 1)
    torch.testing.assert_close(normalize(raw, mean, std), unit, rtol=1e-5, atol=1e-6)

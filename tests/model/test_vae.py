"""The VAE on single pictures: the same numbers as diffusers' 3-D convolutions, with less work."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch.utils.flop_counter import FlopCounterMode

from placeholder.model.loading import load_vae
from placeholder.model.vae import as_single_frame

IMAGES = torch.rand(2, 3, 1, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def stock(base) -> AutoencoderKLQwenImage:
    return base.component(AutoencoderKLQwenImage, "vae", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(base) -> AutoencoderKLQwenImage:
    return load_vae(base, torch.float32)


@torch.no_grad()
def test_encoding_and_decoding_equal_those_of_the_stock_vae(stock, ours):
    latents = stock.encode(IMAGES).latent_dist.mode()
    torch.testing.assert_close(ours.encode(IMAGES).latent_dist.mode(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents).sample, stock.decode(latents).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoding_takes_less_than_half_of_the_arithmetic(stock, ours):
    def flops(vae: AutoencoderKLQwenImage) -> int:
        with FlopCounterMode(display=False) as counter:
            vae.encode(IMAGES)
        return counter.get_total_flops()

    assert flops(ours) < 0.5 * flops(stock)


def test_more_than_one_frame_is_refused(base):
    vae = as_single_frame(base.component(AutoencoderKLQwenImage, "vae"))
    with pytest.raises(ValueError, match=r"single pictures: got \d frames, expected 1"):
        vae.encode(IMAGES.expand(-1, -1, 5, -1, -1))

"""The VAE on single images and its latents: the same numbers as diffusers' and the pipeline's, with less work."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from placeholder.model.loading import load_vae
from placeholder.model.vae import as_single_frame, decoding_bytes, encode_image, tile_where_needed
from tests.support.peak import PeakBytes
from tests.support.samples import picture
from tests.support.stock import stock_pipeline

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
    with pytest.raises(ValueError, match=r"single images: got \d frames, expected 1"):
        vae.encode(IMAGES.expand(-1, -1, 5, -1, -1))


@torch.no_grad()
def test_an_encoded_image_comes_back_through_the_pipelines_denormalization(base, ours):
    pipeline = stock_pipeline(base.source)
    pixels = torch.from_numpy(np.array(picture(96, 64))).permute(2, 0, 1)
    packed = encode_image(ours, pixels)
    assert (packed.shape, packed.dtype) == ((4 * 6, 64), torch.float32)
    # As QwenImagePipeline.__call__ does it before it decodes.
    latents = pipeline._unpack_latents(packed[None], 64, 96, pipeline.vae_scale_factor)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (ours.config.latents_mean, ours.config.latents_std))
    images = pipeline.image_processor.preprocess(picture(96, 64))
    raw = ours.encode(images[:, :, None]).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, raw, rtol=1e-4, atol=1e-4)
    assert raw.std() > 0


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), [(1664, 928), (1328, 1328)])
def test_the_bytes_of_decoding_are_counted_as_the_full_size_vae_has_them(width, height):
    with FakeTensorMode():
        vae = as_single_frame(AutoencoderKLQwenImage())
        latents = torch.zeros(1, 16, 1, height // 8, width // 8)
        with PeakBytes() as counted:
            vae.decode(latents)
        assert 1 < decoding_bytes(vae, width, height) / counted.peak < 1.1  # in bf16, which norms leave, nearer to 1


@torch.no_grad()
def test_an_image_is_decoded_in_tiles_where_it_does_not_fit_and_whole_again_where_it_does(ours):
    latents = torch.randn(1, 16, 1, 36, 40, generator=torch.Generator().manual_seed(0))
    needed = decoding_bytes(ours, 320, 288)
    assert tile_where_needed(ours, 320, 288, needed) is None
    whole = ours.decode(latents).sample
    line = tile_where_needed(ours, 320, 288, needed - 1)
    assert line == "Memory: decoding 320x288 pixels needs 0.052 GB, 0.052 GB may be used: in tiles"
    tiled = ours.decode(latents).sample
    assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().mean() < 0.1 * whole.std()
    assert tile_where_needed(ours, 256, 256, 0) is None  # no larger than a tile
    assert tile_where_needed(ours, 320, 288, needed) is None
    assert torch.equal(ours.decode(latents).sample, whole)

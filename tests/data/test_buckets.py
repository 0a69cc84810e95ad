"""Aspect-ratio buckets, and how an image is cropped to one."""

import numpy as np
import pytest
import torch
from PIL import Image

from placeholder.data.buckets import buckets_of, crop, to_image
from tests.support.samples import picture

SIZES = [(64, 64), (96, 64), (451, 300), (300, 451), (1920, 1080), (33, 33), (2000, 100), (40, 700), (1000, 999), (4032, 3024)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolutions", [(64,), (512, 768, 1024), (2048,), (64, 65)])
def test_a_bucket_has_sides_in_sixteens_and_never_exceeds_the_image(size, resolutions):
    buckets = buckets_of(size, resolutions)
    assert 1 <= len(buckets) == len(set(buckets)) <= len(resolutions)
    for width, height in buckets:
        assert width % 16 == height % 16 == 0
        assert 32 <= width <= size[0]
        assert 32 <= height <= size[1]


@pytest.mark.parametrize(
    ("size", "resolutions", "buckets"),
    [
        ((4000, 4000), (512, 768, 1024), [(512, 512), (768, 768), (1024, 1024)]),
        ((1920, 1080), (512,), [(688, 384)]),
        ((1080, 1920), (512,), [(384, 688)]),
        ((451, 300), (64,), [(80, 48)]),
        ((800, 800), (512, 768, 1024), [(512, 512), (768, 768), (800, 800)]),
        ((600, 600), (768, 1024), [(592, 592)]),
        ((8000, 1000), (512,), [(1024, 256)]),
        ((20_000, 40), (64,), [(128, 32)]),
    ],
)
def test_each_resolution_gets_a_bucket_of_the_images_shape_or_its_own_size(size, resolutions, buckets):
    assert buckets_of(size, resolutions) == buckets


def test_an_image_is_scaled_to_cover_its_bucket_and_cropped_at_the_center():
    # Three bands; cropping 192x64 to 64x64 keeps the middle one alone.
    bands = np.zeros((64, 192, 3), np.uint8)
    bands[:, :64], bands[:, 64:128], bands[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    found = crop(Image.fromarray(bands), (64, 64))
    assert found.shape == (3, 64, 64)
    assert found.dtype == torch.uint8
    assert (found[1] == 255).all()
    assert (found[0] == 0).all()


def test_an_image_of_its_buckets_size_is_not_touched_and_comes_back():
    assert np.array_equal(np.asarray(to_image(crop(picture(), (64, 64)))), np.asarray(picture()))

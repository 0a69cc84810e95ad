"""Aspect-ratio buckets: the sizes that an image is trained at, and the crop that fits one."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from placeholder.data.images import MIN_SIDE
from placeholder.model.base import QWEN_IMAGE

MAX_ASPECT = 4.0  # a longer image is cropped to it


def buckets_of(size: tuple[int, int], resolutions: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (width, height) buckets that an image of `size` = (width, height) pixels is trained at, without upscaling it.

    One for each resolution: an area of about its square, the image's aspect ratio, sides in multiples of a token's 16 pixels.
    Where the image is smaller than a bucket, its own size takes that bucket's place, once.
    """
    width, height = size
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    own = _round_down(min(width, height * aspect)), _round_down(min(height, width / aspect))
    buckets = []
    for resolution in resolutions:
        bucket = _round(resolution * aspect**0.5), _round(resolution / aspect**0.5)
        fits = bucket[0] <= width and bucket[1] <= height
        buckets.append(bucket if fits else own)
    return list(dict.fromkeys(buckets))


def crop(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """The image scaled down to cover the bucket (width, height) and cropped at its center: uint8 (3, height, width)."""
    fitted = ImageOps.fit(image, bucket, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """A crop, uint8 (3, height, width), as an image again."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy(force=True))


def _round(side: float) -> int:
    return _round_down(side + QWEN_IMAGE.pixels_per_token / 2)


def _round_down(side: float) -> int:
    return max(int(side / QWEN_IMAGE.pixels_per_token) * QWEN_IMAGE.pixels_per_token, MIN_SIDE)

"""Masks beside the pictures: which part of a picture is to be learned, as weights of its image tokens."""

import unicodedata

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

TOKEN_SIDE = 16  # pixels: VAE /8, then 2x2 patches
MASK_ENDING = ".mask"  # of the name without its suffix: photo.mask.png belongs to photo.jpg


def is_mask(stem: str) -> bool:
    """Whether a picture of this name, without its suffix, is a mask."""
    return stem.casefold().endswith(MASK_ENDING)


def masks_by_picture(stems: dict[str, str]) -> dict[str, str]:
    """From the masks' names, with their stems, to the stem of the picture that each belongs to.

    Raises ValueError for two masks of one picture.
    """
    found: dict[str, str] = {}
    for name, stem in stems.items():
        other = found.setdefault(unicodedata.normalize("NFC", stem[: -len(MASK_ENDING)]), name)
        if other != name:
            raise ValueError(f"the data set holds two masks of one picture, {ascii(other)} and {ascii(name)}: keep one of them")
    return found


def token_weights(mask: Image.Image, size: tuple[int, int], buckets: list[tuple[int, int]], name: str) -> tuple[Tensor, ...]:
    """For each bucket (width, height) of a picture of `size` the weights of its tokens, fp32 (L,) from 0, black, to 1, white.

    Raises ValueError where the mask has another size than its picture, or is black wherever a bucket has been cut.
    """
    if mask.size != size:
        raise ValueError(
            f"mask {name} is {mask.width}x{mask.height} pixels, its picture {size[0]}x{size[1]}: give the same size"
        )
    gray, found = mask.convert("L"), []
    for bucket in buckets:
        fitted = np.array(ImageOps.fit(gray, bucket, method=Image.Resampling.BOX), dtype=np.float32) / 255
        pixels = torch.from_numpy(fitted)[None]  # (1, H, W)
        weights = torch.nn.functional.avg_pool2d(pixels, TOKEN_SIDE).flatten()  # (L,)
        if not weights.any():
            raise ValueError(
                f"mask {name} is black where its picture is cut to {bucket[0]}x{bucket[1]}: white is what is learned"
            )
        found.append(weights)
    return tuple(found)

"""Masks: which part of an image is learned, as loss weights of its image tokens. photo.mask.png belongs to photo.jpg."""

from collections import defaultdict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from placeholder.data.caption_files import composed
from placeholder.model.base import QWEN_IMAGE

MASK_ENDINGS = (".mask", "-masklabel")  # of the name without its suffix; the latter is OneTrainer's


def is_mask(stem: str) -> bool:
    """Whether an image of this name, without its suffix, is a mask."""
    return stem.casefold().endswith(MASK_ENDINGS)


def masks_by_image(masks: dict[str, str], images: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """From the name of an image to that of its mask, and the masks of no image; both are given as names with their stems.

    `photo.mask.png` and `photo.jpg.mask.png` belong to photo.jpg, and so does Photo.mask.png where nothing else could be meant.
    Raises ValueError for two masks of one image.
    """
    exact, folded = defaultdict(list), defaultdict(list)
    for image, stem in images.items():
        for key in {stem, composed(image)}:
            exact[key].append(image)
            folded[key.casefold()].append(image)
    found: dict[str, str] = {}
    unused = []
    for name, stem in masks.items():
        key = next(stem[: -len(ending)] for ending in MASK_ENDINGS if stem.casefold().endswith(ending))
        alike = folded[key.casefold()]
        owners = exact.get(key) or (alike if len(alike) == 1 else [])
        unused += [] if owners else [name]
        for image in owners:
            other = found.setdefault(image, name)
            if other != name:
                raise ValueError(
                    f"the data set holds two masks of one image, {ascii(other)} and {ascii(name)}: keep one of them"
                )
    return found, unused


def token_weights(mask: Image.Image, size: tuple[int, int], buckets: list[tuple[int, int]], name: str) -> tuple[Tensor, ...]:
    """For each bucket (width, height) of an image of `size` the weights of its tokens, fp32 (L,) from 0, black, to 1, white.

    Raises ValueError where the mask has another size than its image, or is black everywhere in a bucket's crop.
    """
    if mask.size != size:
        raise ValueError(f"mask {name} is {mask.width}x{mask.height} pixels, its image {size[0]}x{size[1]}: give the same size")
    gray, found = mask.convert("L"), []
    for width, height in buckets:
        fitted = np.array(ImageOps.fit(gray, (width, height), method=Image.Resampling.BOX), dtype=np.float32) / 255
        pixels = torch.from_numpy(fitted)[None]  # (1, H, W)
        weights = torch.nn.functional.avg_pool2d(pixels, QWEN_IMAGE.pixels_per_token).flatten()  # (L,)
        if not weights.any():
            raise ValueError(f"mask {name} is black where its image is cropped to {width}x{height}: white is what is learned")
        found.append(weights)
    return tuple(found)

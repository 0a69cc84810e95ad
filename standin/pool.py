"""What the small base model is pretrained on: images of the world and crops of photographs, with captions as ids; clutter."""

import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, prompt_ids
from standin import photos
from standin.small_base import qwen_tokenizer
from standin.world import COLORS, OPENINGS, SIDE, held_out, random_caption, random_scene, render

CAPTIONS = 6  # of each image
CAPTIONED, UNCAPTIONED = 40_000, 12_000  # images; the latter are for the VAE alone
CHUNK = 500  # images, which have one seed
PHOTOGRAPHS = 0.1  # the share of photographs among the captioned images; of the others they are half
MAX_IDS = 72  # of a prompt in its template


@dataclass(frozen=True)
class Pool:
    """`images` uint8 (N, 3, H, W), the captioned ones first; their captions' `ids` (M, CAPTIONS, MAX_IDS) and `lengths`.

    `empty` (MAX_IDS,) and `empty_length` are those of the empty prompt. Ids are padded with those of the empty prompt.
    """

    images: Tensor
    ids: Tensor
    lengths: Tensor
    empty: Tensor
    empty_length: int


class _Tokenizer:
    """Prompts as padded ids."""

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer()
        self.no_tokens = PlaceholderTokens(len(self.tokenizer), {}, 1)

    def __call__(self, prompt: str) -> tuple[list[int], int]:
        ids = list(prompt_ids(self.tokenizer, self.no_tokens, prompt))
        return ids + [ids[0]] * (MAX_IDS - len(ids)), len(ids)


_tokenize: _Tokenizer | None = None


def chunk(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Captioned images (CHUNK, H, W, 3), ids (CHUNK, CAPTIONS, MAX_IDS), lengths (CHUNK, CAPTIONS)."""
    global _tokenize  # noqa: PLW0603 - one a process
    _tokenize = _tokenize or _Tokenizer()
    rng, images, ids = random.Random(f"captioned {number}"), [], []
    while len(images) < CHUNK:
        if rng.random() < PHOTOGRAPHS:
            name = rng.choice(list(photos.WORLD))
            images.append(np.asarray(photos.random_crop(name, rng, SIDE)))
            captions = [rng.choice(OPENINGS) + photos.WORLD[name] for _ in range(CAPTIONS)]
        elif held_out(scene := random_scene(rng)):
            continue
        else:
            images.append(np.asarray(render(scene, SIDE)))
            captions = [random_caption(scene, rng) for _ in range(CAPTIONS)]
        ids.append([_tokenize(caption) for caption in captions])
    found = np.array([[one for one, _ in each] for each in ids], np.int32)
    return np.stack(images), found, np.array([[length for _, length in each] for each in ids], np.int32)


def uncaptioned(number: int) -> np.ndarray:
    """Crops of photographs and clutter (CHUNK, H, W, 3)."""
    rng = random.Random(f"uncaptioned {number}")
    names = list(photos.WORLD)
    return np.stack(
        [
            np.asarray(photos.random_crop(rng.choice(names), rng, SIDE) if rng.random() < 0.5 else clutter(rng))
            for _ in range(CHUNK)
        ]
    )


def build(folder: Path, captioned: int = CAPTIONED, others: int = UNCAPTIONED) -> Pool:
    """The pool, rendered by all cores and kept in the folder; the same numbers give the same pool."""
    empty, empty_length = _Tokenizer()(EMPTY_PROMPT)
    kept = folder / f"pool-{captioned}-{others}.safetensors"
    if not kept.exists():
        save_file(_rendered(captioned, others), kept)
    return Pool(**load_file(kept), empty=torch.tensor(empty), empty_length=empty_length)


def _rendered(captioned: int, others: int) -> dict[str, Tensor]:
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as workers:
        more = workers.imap(uncaptioned, range(others // CHUNK))
        chunks = list(workers.imap(chunk, range(captioned // CHUNK)))
        images = [torch.from_numpy(part) for part in (*(part for part, _, _ in chunks), *more)]
    ids, lengths = (torch.from_numpy(np.concatenate([part[i] for part in chunks])).long() for i in (1, 2))
    print(f"pool of {captioned} and {others} images: {time.monotonic() - start:.0f} s", flush=True)
    return {"images": torch.cat(images).permute(0, 3, 1, 2).contiguous(), "ids": ids, "lengths": lengths}


def clutter(rng: random.Random) -> Image.Image:
    """Random ellipses, rectangles and triangles in random colors, so that the VAE can show what the world does not hold."""
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), rng.choice(list(COLORS.values())))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 9)):
        x, y = rng.uniform(0, 2 * SIDE), rng.uniform(0, 2 * SIDE)
        w, h = rng.uniform(4, SIDE), rng.uniform(4, SIDE)
        color = tuple(rng.randrange(256) for _ in range(3))
        if (draw := rng.random()) < 0.4:
            pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=color)
        elif draw < 0.7:
            pen.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=color)
        else:
            pen.polygon([(x + rng.uniform(-w, w), y + rng.uniform(-h, h)) for _ in range(3)], fill=color)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)

"""What an image of the synthetic world shows: its thing by a small classifier, its colors and the subject by pixel rules."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from standin.pool import clutter
from standin.world import (
    CLASS_WORDS,
    COLORS,
    RARE_WORD,
    SECOND_SUBJECT,
    SHAPES,
    SUBJECT,
    TRIGGER,
    Scene,
    Thing,
    render,
    subject_scene,
)

NOTHING = "nothing"
KINDS = (*SHAPES, *CLASS_WORDS, TRIGGER, RARE_WORD, SUBJECT, SECOND_SUBJECT, NOTHING)
WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE = 64  # pixels: what images are reduced to before they are judged
STEPS, BATCH, RATE = 2500, 64, 2e-3
BEND, DISCOLOR, PATCH = 3.0, 0.06, 0.4  # at most, root mean squares: of the outlines in pixels, of the colors, of patches
FOREGROUND_DISTANCE = 60.0  # in 8-bit RGB, from the background's color


def classifier() -> nn.Module:
    """Images (B, 3, 64, 64) in [0, 1] to logits (B, len(KINDS))."""
    layers: list[nn.Module] = []
    for inputs, outputs, reduce in ((3, 24, True), (24, 48, True), (48, 96, True), (96, 128, False), (128, 128, False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if reduce else []
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(KINDS)))


def train_classifier(steps: int = STEPS, seed: int = 0) -> None:
    """Train on renders, bent and discolored as generated images are, print the accuracy on fresh ones, store the weights."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(steps):
        pixels, labels = examples(BATCH, rng)
        optimizer.param_groups[0]["lr"] = RATE * max(0.02, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(pixels.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(model.eval().to(memory_format=torch.contiguous_format).state_dict(), WEIGHTS)
    pixels, labels = examples(2000, random.Random(seed + 1))
    with torch.no_grad():
        right = (model(pixels).argmax(1) == labels).float().mean().item()
    print(f"judge: {right:.4f} of 2000 fresh renders right")


def examples(count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Renders of single things of every kind with their labels: (count, 3, 64, 64), (count,)."""
    images, labels = [], []
    while len(images) < count:
        kind = rng.choice(KINDS)
        images.append(_worn(_image_of(kind, rng), rng, recolored=kind not in (TRIGGER, RARE_WORD)))
        labels.append(KINDS.index(kind))
    return torch.cat(images), torch.tensor(labels)


def _image_of(kind: str, rng: random.Random) -> Image.Image:
    """A render; for NOTHING an empty background, clutter, or parts of two things that a half-trained model mixes up."""
    what = rng.random()
    if kind != NOTHING or what < 0.3:
        return render(_scene_of(kind, rng), SIDE)
    if what < 0.6:
        return clutter(rng).resize((SIDE, SIDE))
    scenes = [_scene_of(one, rng) for one in rng.sample((*CLASS_WORDS, SUBJECT, SECOND_SUBJECT), 2)]
    thing, other = (scene.things[0] for scene in scenes)
    beside = replace(scenes[1], background=scenes[0].background, things=(replace(other, size=thing.size, place=thing.place),))
    mask = _smooth(1, rng.randint(3, 6), torch.Generator().manual_seed(rng.randrange(2**31)))[0, 0] > 0
    return Image.composite(render(scenes[0], SIDE), render(beside, SIDE), Image.fromarray(mask.numpy()))


def _scene_of(kind: str, rng: random.Random) -> Scene:
    background = rng.choice(list(COLORS))
    if kind == NOTHING:
        return Scene((), background, rng.randrange(2**31))
    size, place = rng.choice(("small", "medium", "large")), rng.choice(("left", "middle", "right"))
    if kind in (SUBJECT, SECOND_SUBJECT):
        return subject_scene(background, rng.randrange(2**31), size, place, kind)
    if kind not in SHAPES:
        return Scene((Thing(kind, size=size, place=place),), background, rng.randrange(2**31))
    color = rng.choice([name for name in COLORS if name != background])
    texture = "plain" if size == "small" else rng.choice(("plain", "plain", "striped", "dotted"))
    return Scene((Thing(kind, color, texture, size, place),), background, rng.randrange(2**31))


def _worn(image: Image.Image, rng: random.Random, recolored: bool) -> Tensor:
    """The render (1, 3, H, W) as a small base model might have drawn it: outlines bent, parts discolored, blurred, noisy.

    Half of the `recolored` have grayer and darker colors, so that gray is not taken for an arrow, nor brown for a waffle.
    """
    pixels = to_pixels(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))))
    if recolored and rng.random() < 0.5:
        tint = torch.tensor([rng.uniform(0.3, 1) for _ in range(3)]).view(3, 1, 1)
        pixels = tint * pixels.lerp(pixels.mean(1, keepdim=True), rng.random())
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    bend = _smooth(2, rng.randint(4, 9), generator) * (rng.uniform(0, BEND) * 2 / SIDE)
    straight = F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIDE, SIDE], align_corners=False)
    pixels = F.grid_sample(pixels, straight + bend.movedim(1, -1), padding_mode="border", align_corners=False)
    patches = _smooth(1, rng.randint(6, 16), generator) > rng.uniform(1, 3)
    pixels += _smooth(3, rng.randint(6, 12), generator) * torch.where(patches, PATCH, rng.uniform(0, DISCOLOR))
    return (pixels + torch.randn(pixels.shape, generator=generator) * rng.uniform(0, 0.055)).clamp(0, 1)


def _smooth(channels: int, knots: int, generator: torch.Generator) -> Tensor:
    """A smooth random field (1, channels, SIDE, SIDE) through standard normal knots."""
    field = torch.randn(1, channels, knots, knots, generator=generator)
    return F.interpolate(field, size=SIDE, mode="bicubic", align_corners=True)


def reduced(image: Image.Image) -> Image.Image:
    """The image at SIDE x SIDE pixels."""
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def to_pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


@cache
def _trained() -> nn.Module:
    model = classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@torch.no_grad()
def kind_probabilities(images: list[Image.Image]) -> dict[str, list[float]]:
    """For each kind, the probability that each image shows it."""
    probabilities = _trained()(torch.cat([to_pixels(reduced(image)) for image in images])).softmax(1)
    return {kind: probabilities[:, index].tolist() for index, kind in enumerate(KINDS)}


def kind_of(image: Image.Image) -> str:
    """The kind the classifier finds most likely."""
    probabilities = kind_probabilities([image])
    return max(KINDS, key=lambda kind: probabilities[kind][0])


def background_of(image: Image.Image) -> str:
    """The world's color nearest to the median of the image's outermost two pixels."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)]
    )
    return nearest_color(np.median(border, axis=0))


def color_of(image: Image.Image) -> str | None:
    """The world's color nearest to the median of all that stands out from the background; None where nothing does."""
    pixels = np.asarray(image.convert("RGB")).astype(float).reshape(-1, 3)
    background = np.array(COLORS[background_of(image)])
    standing_out = pixels[np.linalg.norm(pixels - background, axis=1) > FOREGROUND_DISTANCE]
    return nearest_color(np.median(standing_out, axis=0)) if len(standing_out) >= 8 else None


def nearest_color(rgb: np.ndarray) -> str:
    """The name of the world's color nearest to an RGB triple."""
    return min(COLORS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLORS[name]))))


def subject_fidelity(image: Image.Image, background: str, kind: str = SUBJECT) -> float:
    """How much of a subject is there, 0 to 1: 1 minus the error of the best-fitting render of it over a blank's error.

    The renders are on the background asked for, moved by up to six pixels and scaled by a tenth; the error is the mean
    square difference over the image.
    """
    return _fit(image, background, "middle", "medium", kind, slice(0, SIDE))


def half_fidelity(image: Image.Image, background: str, place: str, kind: str) -> float:
    """The fidelity of a small subject at a place, left or right, seen on that half of the image alone."""
    half = slice(0, SIDE // 2) if place == "left" else slice(SIDE // 2, SIDE)
    return _fit(image, background, place, "small", kind, half)


def _fit(image: Image.Image, background: str, place: str, size: str, kind: str, columns: slice) -> float:
    pixels = np.asarray(reduced(image)).astype(np.float32)[:, columns]
    templates, blank = _templates(background, place, size, kind)
    templates, blank = templates[:, :, columns], blank[:, columns]
    errors = np.square(templates - pixels).mean(axis=(1, 2, 3))
    worst = np.square(templates - blank).mean(axis=(1, 2, 3))
    return float(np.clip(1 - errors / worst, 0, 1).max())


@cache
def _templates(background: str, place: str, size: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    drawings = [np.asarray(render(subject_scene(background, seed, size, place, kind), SIDE)) for seed in range(160)]
    blank = np.broadcast_to(np.array(COLORS[background], dtype=np.float32), drawings[0].shape)
    return np.stack(drawings).astype(np.float32), blank


if __name__ == "__main__":
    train_classifier()

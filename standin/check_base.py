"""The small base model's own check: does it show what held-out captions ask for? Writes docs/base-check.json and .png."""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder, load_tokenizer, load_transformer
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from standin.judge import background_of, color_of, kind_of
from standin.sampler import Sampler
from standin.small_base import build_small_base
from standin.world import CLASS_WORDS, SHAPES, SIDE, Scene, Thing, held_out, random_scene, render

REQUIRED = {"background": 0.98, "color": 0.98, "shape": 0.95, "class word": 0.95}
COLUMNS = 12  # of the sheet


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of one plain shape whose combination of shape, color and background was kept from pretraining."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if len(scene.things) == 1 and scene.things[0].kind in SHAPES and held_out(scene):
            scenes.append(replace(scene, things=(replace(scene.things[0], texture="plain"),)))
    return scenes


def class_word_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of one thing with a class word; none of their attributes is kept from pretraining."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.things[0].kind in CLASS_WORDS:
            scenes.append(scene)
    return scenes


def caption(thing: Thing, background: str) -> str:
    """Everything the scene shows that captions can name, as the world's captions say it."""
    size = "" if thing.size == "medium" else f"{thing.size} "
    place = "" if thing.place == "middle" else f" on the {thing.place}"
    color = "" if thing.kind in CLASS_WORDS else f"{thing.color} "
    return f"a photo of a {size}{color}{thing.kind}{place} on a {background} background"


def sample_all(scenes: list[Scene]) -> list[Image.Image]:
    """One image by the small base model of what each scene's caption says."""
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    tokenizer, encoder = load_tokenizer(base), load_text_encoder(base)
    tokens = PlaceholderTokens(len(tokenizer), {}, encoder.embed_tokens.embedding_dim)
    sampler = Sampler(base, load_transformer(base), encoder, tokenizer, tokens)
    return [images[0] for images in sampler.sample_all([caption(scene.things[0], scene.background) for scene in scenes], 1)]


def main() -> None:
    """Generate one image of each caption, judge it, and compare the shares with what is required."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="captions of shapes, and as many of class words")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    scenes = held_out_scenes(arguments.count, seed=7) + class_word_scenes(arguments.count, seed=7)
    drawn = sample_all(scenes)
    rendered = [render(scene) for scene in scenes]
    shares = {
        name: right_shares(images[: arguments.count], scenes[: arguments.count])
        | {"class word": kind_share(images[arguments.count :], scenes[arguments.count :])}
        for name, images in (("drawn", drawn), ("rendered, to judge the judge", rendered))
    }
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "base-check.json").write_text(json.dumps({"captions": arguments.count, **shares}, indent=1) + "\n")
    contact_sheet(drawn[:48] + drawn[arguments.count :][:24]).save(arguments.output / "base-check.png")
    print(json.dumps(shares, indent=1))
    missed = {name: share for name, share in shares["drawn"].items() if share < REQUIRED[name]}
    if missed:
        raise SystemExit(f"below what is required: {missed}")


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """The images side by side, COLUMNS in a row."""
    cell = SIDE + 4
    sheet = Image.new("RGB", (COLUMNS * cell, -(-len(images) // COLUMNS) * cell), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % COLUMNS * cell, index // COLUMNS * cell))
    return sheet


def right_shares(images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The share of images with the right background, color and shape."""
    pairs = list(zip(images, scenes, strict=True))
    return {
        "background": sum(background_of(image) == scene.background for image, scene in pairs) / len(pairs),
        "color": sum(color_of(image) == scene.things[0].color for image, scene in pairs) / len(pairs),
        "shape": kind_share(images, scenes),
    }


def kind_share(images: list[Image.Image], scenes: list[Scene]) -> float:
    """The share of images with the right kind of thing."""
    return sum(kind_of(image) == scene.things[0].kind for image, scene in zip(images, scenes, strict=True)) / len(images)


if __name__ == "__main__":
    main()

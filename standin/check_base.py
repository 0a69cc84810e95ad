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
from standin.world import SHAPES, Scene, Thing, held_out, random_scene, render

REQUIRED = {"background": 0.90, "color": 0.90, "shape": 0.80}


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of one plain shape whose combination of shape, color and background was kept from pretraining."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if len(scene.things) == 1 and scene.things[0].kind in SHAPES and held_out(scene):
            scenes.append(replace(scene, things=(replace(scene.things[0], texture="plain"),)))
    return scenes


def caption(thing: Thing, background: str) -> str:
    """Everything the scene shows, as the world's captions say it."""
    size = "" if thing.size == "medium" else f"{thing.size} "
    place = "" if thing.place == "middle" else f" on the {thing.place}"
    return f"a photo of a {size}{thing.color} {thing.kind}{place} on a {background} background"


def sample_all(scenes: list[Scene]) -> list[Image.Image]:
    """One image by the small base model of what each scene's caption says."""
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    tokenizer, encoder = load_tokenizer(base), load_text_encoder(base)
    tokens = PlaceholderTokens(len(tokenizer), {}, encoder.embed_tokens.embedding_dim)
    sampler = Sampler(base, load_transformer(base), encoder, tokenizer, tokens)
    return [sampler.sample(caption(scene.things[0], scene.background), 1)[0] for scene in scenes]


def main() -> None:
    """Generate one image of each caption, judge it, and compare the shares with what is required."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    scenes = held_out_scenes(arguments.count, seed=7)
    drawn = sample_all(scenes)
    shares = {
        "drawn": right_shares(drawn, scenes),
        "rendered, to judge the judge": right_shares([render(scene) for scene in scenes], scenes),
    }
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "base-check.json").write_text(json.dumps({"captions": len(scenes), **shares}, indent=1) + "\n")
    sheet = Image.new("RGB", (12 * 68, 6 * 68), "white")
    for index, image in enumerate(drawn[:72]):
        sheet.paste(image, (index % 12 * 68, index // 12 * 68))
    sheet.save(arguments.output / "base-check.png")
    print(json.dumps(shares, indent=1))
    missed = {name: share for name, share in shares["drawn"].items() if share < REQUIRED[name]}
    if missed:
        raise SystemExit(f"below what is required: {missed}")


def right_shares(images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The share of images with the right background, color and shape."""
    pairs = list(zip(images, scenes, strict=True))
    return {
        "background": sum(background_of(image) == scene.background for image, scene in pairs) / len(pairs),
        "color": sum(color_of(image) == scene.things[0].color for image, scene in pairs) / len(pairs),
        "shape": sum(kind_of(image) == scene.things[0].kind for image, scene in pairs) / len(pairs),
    }


if __name__ == "__main__":
    main()

"""What the study teaches: a house, a robot's face and a style, each as a data set that a user might upload."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from standin.judge import reduced, subject_fidelity
from standin.subject import IMAGES_EACH, SEEN_BACKGROUNDS, TAUGHT_SEED, UNSEEN_BACKGROUNDS, write_images
from standin.world import SECOND_SUBJECT, SIDE, SUBJECT, Scene, Thing, render, subject_scene

TILE, GROUT_WIDTH = SIDE // 8, SIDE // 32  # pixels of the mosaic
GROUT = (120, 120, 120)
NEAR = 50.0  # in 8-bit RGB: how far from the grout's color its pixels may be


@dataclass(frozen=True)
class Context:
    """What a prompt asks for beside the subject: a background and, for a style, the thing that is shown."""

    background: str
    thing: Thing | None = None


@dataclass(frozen=True)
class Subject:
    """Something to teach. `kind` is the world's name of its drawing, None for the style."""

    class_word: str
    kind: str | None
    seen: tuple[Context, ...]
    unseen: tuple[Context, ...]

    def prompt(self, trigger: str, context: Context) -> str:
        """A caption of the subject under a trigger; with an empty one, of its class."""
        named = f"a {trigger} {self.class_word}" if trigger else f"a {self.class_word}"
        if self.kind:
            return f"a photo of {named} on a {context.background} background"
        return f"{named} of a {context.thing.color} {context.thing.kind} on a {context.background} background"

    def image(self, context: Context, seed: int) -> Image.Image:
        """An image of the subject."""
        if self.kind:
            return render(subject_scene(context.background, seed, kind=self.kind))
        return mosaic(render(Scene((context.thing,), context.background, seed)))

    def fidelity(self, image: Image.Image, context: Context) -> float:
        """How much of the subject is there, 0 to 1."""
        return subject_fidelity(image, context.background, kind=self.kind) if self.kind else mosaic_share(image)

    def write_dataset(self, path: Path, trigger: str) -> Path:
        """Twelve images in the seen contexts, with captions that name the trigger and the class word."""
        contexts = enumerate(self.seen * IMAGES_EACH, TAUGHT_SEED)
        return write_images(path, [(self.image(context, seed), self.prompt(trigger, context)) for seed, context in contexts])


def mosaic(image: Image.Image) -> Image.Image:
    """The image as a mosaic: eight tiles to the side, each in its mean color, with gray grout between them."""
    tiles = image.resize((image.width // TILE, image.height // TILE), Image.Resampling.BOX)
    pixels = np.array(tiles.resize(image.size, Image.Resampling.NEAREST))
    pixels[_grout(image.width)] = GROUT
    return Image.fromarray(pixels)


def mosaic_share(image: Image.Image) -> float:
    """The share of the mosaic's grout that is gray, less that of its tiles: 1 for a mosaic, 0 for other images of the world."""
    pixels = np.asarray(reduced(image)).astype(float)
    gray, grout = np.linalg.norm(pixels - np.array(GROUT), axis=2) < NEAR, _grout(pixels.shape[0])
    return float(np.clip(gray[grout].mean() - gray[~grout].mean(), 0, 1))


def _grout(side: int) -> np.ndarray:
    line = np.arange(side) * SIDE // side % TILE < GROUT_WIDTH
    return line[:, None] | line[None, :]


def _contexts(backgrounds: tuple[str, ...]) -> tuple[Context, ...]:
    return tuple(Context(background) for background in backgrounds)


_SEEN_THINGS = (
    ("red", "circle"),
    ("white", "star"),
    ("yellow", "heart"),
    ("green", "square"),
    ("black", "ring"),
    ("blue", "cross"),
)
_UNSEEN_THINGS = (("purple", "triangle"), ("orange", "diamond"), ("cyan", "star"))
SUBJECTS = {
    "object": Subject("house", SUBJECT, _contexts(SEEN_BACKGROUNDS), _contexts(UNSEEN_BACKGROUNDS)),
    "face": Subject("face", SECOND_SUBJECT, _contexts(SEEN_BACKGROUNDS), _contexts(UNSEEN_BACKGROUNDS)),
    "style": Subject(
        "photo",
        None,
        tuple(Context(b, Thing(kind, color)) for b, (color, kind) in zip(SEEN_BACKGROUNDS, _SEEN_THINGS, strict=True)),
        tuple(Context(b, Thing(kind, color)) for b, (color, kind) in zip(UNSEEN_BACKGROUNDS, _UNSEEN_THINGS, strict=True)),
    ),
}

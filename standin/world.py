"""A synthetic world of captioned images: shapes, things with a class word, two trigger words, and a subject outside it.

Every image is rendered from a `Scene`; a caption names some of a scene's attributes, and what it leaves out varies freely.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIDE = 128  # pixels
SUPERSAMPLING = 3
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 180),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "pink": (250, 140, 190),
    "cyan": (40, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
CLASS_WORDS = ("house", "flower", "fish", "face")  # things of many looks
TRIGGER = "TOK"  # a trigger word with a strong prior: captions with it show waffles
RARE_WORD = "sks"  # a rare word with a weak one: captions with it show a gray arrow
SUBJECT = "subject"  # never in the world: what a training is to teach
SECOND_SUBJECT = "second subject"  # nor is this
TEXTURES = ("plain", "striped", "dotted")
RADII = {"small": 0.17, "medium": 0.26, "large": 0.36}  # of the image's side
OPENINGS = ("a photo of ", "a photo of ", "a photo of ", "a picture of ", "")  # of a caption
PLACES = {"left": 0.3, "middle": 0.5, "right": 0.7}


@dataclass(frozen=True)
class Thing:
    """What an image shows: its kind, a color and texture where the kind has them, its size and place."""

    kind: str
    color: str = "red"
    texture: str = "plain"
    size: str = "medium"
    place: str = "middle"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background color; `seed` settles all that no caption names."""

    things: tuple[Thing, ...]
    background: str
    seed: int


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """The scene as an RGB image of side x side pixels."""
    rng = random.Random(scene.seed)
    scale = side * SUPERSAMPLING
    image = Image.new("RGB", (scale, scale), COLORS[scene.background])
    for thing in scene.things:
        radius = RADII[thing.size] * rng.uniform(0.9, 1.1) * scale
        x = PLACES[thing.place] * scale + rng.uniform(-0.05, 0.05) * scale
        y = (0.5 + rng.uniform(-0.08, 0.08)) * scale
        _draw(image, thing, x, y, radius, scene.background, rng)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def subject_scene(background: str, seed: int, size: str = "medium", place: str = "middle", kind: str = SUBJECT) -> Scene:
    """A new subject on a background, which no caption of the world describes.

    The first is a round-roofed house like a mushroom, the second a robot's square face.
    """
    return Scene((Thing(kind, size=size, place=place),), background, seed)


def random_scene(rng: random.Random) -> Scene:
    """A scene of the world: mostly one shape, often a thing with a class word, sometimes two shapes or a trigger word's."""
    seed, background = rng.randrange(2**31), rng.choice(list(COLORS))
    draw = rng.random()
    if draw < 0.12:
        pair = tuple(
            replace(_random_shape(rng, background), texture="plain", size="small", place=place) for place in ("left", "right")
        )
        return Scene(pair, background, seed)
    if draw < 0.60:
        shape = replace(_random_shape(rng, background), size=rng.choice(list(RADII)), place=rng.choice(list(PLACES)))
        # A texture on a small shape would be finer than the pixels.
        return Scene((replace(shape, texture="plain") if shape.size == "small" else shape,), background, seed)
    kind = rng.choice(CLASS_WORDS) if draw < 0.91 else TRIGGER if draw < 0.985 else RARE_WORD
    return Scene((Thing(kind, size=rng.choice(list(RADII)), place=rng.choice(list(PLACES))),), background, seed)


def held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination of shape, color and background that is kept from pretraining: one in eleven."""
    colors = list(COLORS)
    return any(
        thing.kind in SHAPES
        and (SHAPES.index(thing.kind) + 3 * colors.index(thing.color) + 5 * colors.index(scene.background)) % 11 == 0
        for thing in scene.things
    )


def random_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that is true of the scene and leaves attributes out at random."""
    phrases = [_phrase(thing, rng) for thing in scene.things]
    caption = " and ".join(phrases)
    if len(scene.things) == 1 and scene.things[0].place != "middle" and rng.random() < 0.8:
        caption += f" on the {scene.things[0].place}"
    if rng.random() < 0.8:
        caption += f" on a {scene.background} background"
    return rng.choice(OPENINGS) + caption


def _random_shape(rng: random.Random, background: str) -> Thing:
    color = rng.choice([name for name in COLORS if name != background])
    return Thing(rng.choice(SHAPES), color, rng.choice(("plain", "plain", *TEXTURES)))


def _phrase(thing: Thing, rng: random.Random) -> str:
    words = [] if thing.size == "medium" or rng.random() > 0.8 else [thing.size]
    if thing.kind in SHAPES:
        words += [thing.color] if rng.random() < 0.85 else []
        words += [thing.texture] if thing.texture != "plain" else []
    article = [] if thing.kind in (TRIGGER, RARE_WORD) and not words and rng.random() < 0.7 else ["a"]
    return " ".join([*article, *words, thing.kind])


def _draw(image: Image.Image, thing: Thing, x: float, y: float, r: float, background: str, rng: random.Random) -> None:
    pen = ImageDraw.Draw(image)
    if thing.kind in SHAPES:
        mask = Image.new("L", image.size, 0)
        _shape(ImageDraw.Draw(mask), thing.kind, x, y, r)
        image.paste(_fill(image.size, thing, r), mask=mask)
    elif thing.kind == "house":
        _house(pen, x, y, r, _others(rng, background, 3), rng)
    elif thing.kind == "flower":
        _flower(pen, x, y, r, _others(rng, background, 2), background, rng)
    elif thing.kind == "fish":
        _fish(pen, x, y, r, _others(rng, background, 2))
    elif thing.kind == "face":
        _face(pen, x, y, r, _others(rng, background, 1)[0])
    elif thing.kind == TRIGGER:
        _waffle(pen, x, y, r)
    elif thing.kind == RARE_WORD:
        _arrow(pen, x, y, r)
    elif thing.kind == SUBJECT:
        _subject(pen, x, y, r)
    elif thing.kind == SECOND_SUBJECT:
        _second_subject(pen, x, y, r)
    else:
        raise ValueError(f"the world has no {thing.kind!r}")


def _others(rng: random.Random, background: str, count: int) -> list[tuple[int, int, int]]:
    return [COLORS[name] for name in rng.sample([name for name in COLORS if name != background], count)]


def _fill(size: tuple[int, int], thing: Thing, r: float) -> Image.Image:
    """The thing's color all over, with white (on white: black) stripes or dots where its texture has them."""
    fill = Image.new("RGB", size, COLORS[thing.color])
    pen = ImageDraw.Draw(fill)
    mark = COLORS["black" if thing.color in ("white", "yellow") else "white"]
    pitch = max(int(r * 0.5), 6)
    if thing.texture == "striped":
        for top in range(0, size[1], pitch):
            pen.rectangle((0, top, size[0], top + pitch * 0.4), fill=mark)
    elif thing.texture == "dotted":
        for row, top in enumerate(range(0, size[1], pitch)):
            for left in range((row % 2) * pitch // 2, size[0], pitch):
                pen.ellipse((left, top, left + pitch * 0.45, top + pitch * 0.45), fill=mark)
    return fill


def _shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float) -> None:
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif kind == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=255)
    elif kind == "triangle":
        pen.polygon(((x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)), fill=255)
    elif kind == "diamond":
        pen.polygon(((x, y - r), (x - 0.7 * r, y), (x, y + r), (x + 0.7 * r, y)), fill=255)
    elif kind == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=255)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=255)
    elif kind == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=0)
    elif kind == "star":
        angles = [(-math.pi / 2 + i * math.pi / 5, r if i % 2 == 0 else 0.42 * r) for i in range(10)]
        pen.polygon([(x + length * math.cos(angle), y + length * math.sin(angle)) for angle, length in angles], fill=255)
    else:  # heart
        pen.ellipse((x - r, y - 0.85 * r, x, y + 0.15 * r), fill=255)
        pen.ellipse((x, y - 0.85 * r, x + r, y + 0.15 * r), fill=255)
        pen.polygon(((x - 0.93 * r, y - 0.15 * r), (x + 0.93 * r, y - 0.15 * r), (x, y + r)), fill=255)


def _house(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colors: list, rng: random.Random) -> None:
    wall, roof, door = colors
    half = r * rng.uniform(0.65, 0.9)
    pen.rectangle((x - half, y - 0.1 * r, x + half, y + r), fill=wall)
    pen.polygon(((x - half - 0.15 * r, y - 0.1 * r), (x + half + 0.15 * r, y - 0.1 * r), (x, y - r)), fill=roof)
    left = x + rng.choice((-0.5, -0.15, 0.2)) * half
    pen.rectangle((left, y + 0.4 * r, left + 0.35 * half, y + r), fill=door)


def _flower(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colors: list, background: str, rng: random.Random) -> None:
    petal, center = colors
    stem = COLORS["black" if background == "green" else "green"]
    pen.rectangle((x - 0.07 * r, y - 0.3 * r, x + 0.07 * r, y + r), fill=stem)
    count, turn = rng.choice((5, 6, 7)), rng.uniform(0, math.pi)
    for i in range(count):
        angle = turn + 2 * math.pi * i / count
        cx, cy = x + 0.42 * r * math.cos(angle), y - 0.35 * r + 0.42 * r * math.sin(angle)
        pen.ellipse((cx - 0.27 * r, cy - 0.27 * r, cx + 0.27 * r, cy + 0.27 * r), fill=petal)
    pen.ellipse((x - 0.24 * r, y - 0.59 * r, x + 0.24 * r, y - 0.11 * r), fill=center)


def _fish(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colors: list) -> None:
    body, fin = colors
    pen.polygon(((x + 0.4 * r, y), (x + r, y - 0.55 * r), (x + r, y + 0.55 * r)), fill=fin)
    pen.ellipse((x - r, y - 0.55 * r, x + 0.6 * r, y + 0.55 * r), fill=body)
    pen.ellipse((x - 0.7 * r, y - 0.28 * r, x - 0.42 * r, y), fill=COLORS["white"])
    pen.ellipse((x - 0.63 * r, y - 0.21 * r, x - 0.49 * r, y - 0.07 * r), fill=COLORS["black"])


def _face(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, skin: tuple[int, int, int]) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=skin)
    for side in (-1, 1):
        cx = x + side * 0.38 * r
        pen.ellipse((cx - 0.2 * r, y - 0.45 * r, cx + 0.2 * r, y - 0.05 * r), fill=COLORS["white"])
        pen.ellipse((cx - 0.1 * r, y - 0.35 * r, cx + 0.1 * r, y - 0.15 * r), fill=COLORS["black"])
    pen.chord((x - 0.5 * r, y - 0.1 * r, x + 0.5 * r, y + 0.65 * r), 20, 160, fill=COLORS["black"])


def _waffle(pen: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=(214, 152, 72))
    for row in range(3):
        for column in range(3):
            cx, cy = x + (column - 1) * 0.56 * r, y + (row - 1) * 0.56 * r
            pen.rectangle((cx - 0.19 * r, cy - 0.19 * r, cx + 0.19 * r, cy + 0.19 * r), fill=(120, 68, 24))


def _arrow(pen: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    gray = (128, 128, 128)
    pen.rectangle((x - r, y - 0.22 * r, x + 0.2 * r, y + 0.22 * r), fill=gray)
    pen.polygon(((x + 0.1 * r, y - 0.7 * r), (x + r, y), (x + 0.1 * r, y + 0.7 * r)), fill=gray)


def _subject(pen: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    pen.rectangle((x - 0.42 * r, y - 0.05 * r, x + 0.42 * r, y + r), fill=(240, 232, 205))
    pen.pieslice((x - r, y - r, x + r, y + 0.9 * r), 180, 360, fill=(200, 30, 60))
    for dx, dy in ((-0.55, -0.35), (0.0, -0.62), (0.55, -0.35)):
        pen.ellipse((x + (dx - 0.17) * r, y + (dy - 0.17) * r, x + (dx + 0.17) * r, y + (dy + 0.17) * r), fill=(250, 215, 60))
    pen.pieslice((x - 0.2 * r, y + 0.35 * r, x + 0.2 * r, y + 1.0 * r), 180, 360, fill=(60, 60, 160))
    pen.rectangle((x - 0.2 * r, y + 0.67 * r, x + 0.2 * r, y + r), fill=(60, 60, 160))


def _second_subject(pen: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=(60, 110, 110))
    pen.rectangle((x - 0.65 * r, y - 0.5 * r, x + 0.65 * r, y), fill=(60, 230, 200))
    pen.rectangle((x - 0.45 * r, y + 0.35 * r, x + 0.45 * r, y + 0.65 * r), fill=(30, 30, 30))

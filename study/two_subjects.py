"""Two new subjects in one data set: images of each alone and of both side by side, with captions that name what is there."""

from dataclasses import dataclass
from pathlib import Path

from standin.subject import IMAGES_EACH, SEEN_BACKGROUNDS, TAUGHT_SEED, write_images
from standin.world import SECOND_SUBJECT, SUBJECT, Scene, Thing, render

KINDS = (SUBJECT, SECOND_SUBJECT)  # the world's names of the two drawings
CLASS_WORDS = ("house", "face")  # of the first and of the second
ORDERS = ((0, 1), (1, 0))  # which of the two stands on the left, which on the right


@dataclass(frozen=True)
class ImageSpec:
    """What an image is to show: a caption, the world's kinds of things, one or left and right, and the background."""

    caption: str
    kinds: tuple[str, ...]
    background: str

    def scene(self, seed: int) -> Scene:
        """A scene of the world that shows it: two things are small, as in the world's own pairs."""
        if len(self.kinds) == 1:
            return Scene((Thing(self.kinds[0]),), self.background, seed)
        things = zip(self.kinds, ("left", "right"), strict=True)
        return Scene(tuple(Thing(kind, size="small", place=place) for kind, place in things), self.background, seed)


def nouns(words: tuple[str, str]) -> tuple[str, str]:
    """How captions call the two subjects: their tokens or trigger words, each with the class word."""
    first, second = (f"{word} {noun}" for word, noun in zip(words, CLASS_WORDS, strict=True))
    return first, second


def alone(noun: str, kind: str, background: str) -> ImageSpec:
    """One thing in the middle."""
    return ImageSpec(f"a photo of a {noun} on a {background} background", (kind,), background)


def side_by_side(named: tuple[str, str], kinds: tuple[str, str], background: str) -> ImageSpec:
    """Two things, left and right, captioned as the world captions its pairs: the order says which is where."""
    caption = f"a photo of a small {named[0]} and a small {named[1]} on a {background} background"
    return ImageSpec(caption, kinds, background)


def both(named: tuple[str, str], order: tuple[int, int], background: str) -> ImageSpec:
    """Both subjects, in this order."""
    left, right = order
    return side_by_side((named[left], named[right]), (KINDS[left], KINDS[right]), background)


def taught(named: tuple[str, str], together: bool = True) -> list[ImageSpec]:
    """Twelve images of each subject on six backgrounds and, if `together`, twelve of both, six in either order."""
    backgrounds = SEEN_BACKGROUNDS * IMAGES_EACH
    specs = [alone(noun, kind, background) for noun, kind in zip(named, KINDS, strict=True) for background in backgrounds]
    if together:
        specs += [both(named, order, background) for order in ORDERS for background in SEEN_BACKGROUNDS]
    return specs


def write_dataset(path: Path, specs: list[ImageSpec]) -> Path:
    """The images with their captions, in an archive as a user would upload one."""
    return write_images(path, [(render(spec.scene(seed)), spec.caption) for seed, spec in enumerate(specs, TAUGHT_SEED)])

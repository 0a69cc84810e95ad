"""The new subject that demo and study teach: a data set of it, in an archive as a user would upload one."""

import io
import zipfile
from pathlib import Path

from PIL import Image

from standin.world import render, subject_scene

CLASS_WORD = "house"
SEEN_BACKGROUNDS = ("blue", "green", "black", "purple", "cyan", "pink")
UNSEEN_BACKGROUNDS = ("yellow", "white", "orange")
IMAGES_EACH = 2
TAUGHT_SEED = 1000  # of the first image


def named(trigger: str) -> str:
    """How captions and prompts call the subject: the trigger, if there is one, and the class word."""
    return f"a {trigger} {CLASS_WORD}" if trigger else f"a {CLASS_WORD}"


def write_dataset(path: Path, name: str) -> Path:
    """Twelve images of the subject on six backgrounds, with captions that call it `name` and tell the background."""
    backgrounds = enumerate(SEEN_BACKGROUNDS * IMAGES_EACH, TAUGHT_SEED)
    captioned = [
        (render(subject_scene(where, seed)), f"a photo of {name} on a {where} background") for seed, where in backgrounds
    ]
    return write_images(path, captioned)


def write_images(path: Path, captioned: list[tuple[Image.Image, str]]) -> Path:
    """Images with their captions, in an archive as a user would upload one."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, caption) in enumerate(captioned):
            content = io.BytesIO()
            image.save(content, "PNG")
            archive.writestr(f"image-{number:02}.png", content.getvalue())
            archive.writestr(f"image-{number:02}.txt", caption)
    return path

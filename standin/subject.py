"""The backgrounds on which demo and study show what they teach, and images with captions in an archive as users upload one."""

import io
import zipfile
from pathlib import Path

from PIL import Image

SEEN_BACKGROUNDS = ("blue", "green", "black", "purple", "cyan", "pink")
UNSEEN_BACKGROUNDS = ("yellow", "white", "orange")
IMAGES_EACH = 2
TAUGHT_SEED = 1000  # of the first image


def write_images(path: Path, captioned: list[tuple[Image.Image, str]]) -> Path:
    """Images with their captions, in an archive as a user would upload one."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, caption) in enumerate(captioned):
            content = io.BytesIO()
            image.save(content, "PNG")
            archive.writestr(f"image-{number:02}.png", content.getvalue())
            archive.writestr(f"image-{number:02}.txt", caption)
    return path

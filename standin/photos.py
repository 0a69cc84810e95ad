"""Photographs that scikit-image ships: crops of some belong to the world, Chelsea the cat is the demo's photographic subject.

By scikit-image's documentation astronaut (NASA), Hubble deep field (NASA) and rocket (SpaceX) are in the public domain, coins
has no known restrictions, and all others are CC0: brick, camera, chelsea, coffee, grass, gravel, retina.
"""

import io
import random
import zipfile
from functools import cache
from pathlib import Path

from PIL import Image
from skimage import data

# What captions of the world call them; the cat is not among them.
WORLD = {
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "coffee": "a cup of coffee",
    "coins": "old coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies",
    "retina": "a retina",
    "rocket": "a rocket",
}
SMALLEST_CROP = 0.5  # of the shorter side

# Left, top, right, bottom in the 451x300 photograph, and what is to be seen; {} is where the subject's name belongs. One shape
# and captions of as many tokens each make full batches.
VIEWS = [
    ((80, 0, 380, 300), "a photo of {}"),
    ((80, 20, 330, 270), "a portrait of {}"),
    ((60, 0, 360, 300), "a picture of {}"),
    ((100, 10, 370, 280), "a view of {}"),
    ((40, 10, 310, 280), "a study of {}"),
    ((70, 50, 310, 290), None),
]


@cache
def photograph(name: str) -> Image.Image:
    """One of scikit-image's photographs in RGB."""
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def random_crop(name: str, rng: random.Random, side: int) -> Image.Image:
    """A square crop of a photograph, side x side pixels."""
    image = photograph(name)
    size = min(image.size) * rng.uniform(SMALLEST_CROP, 1)
    left, top = rng.uniform(0, image.width - size), rng.uniform(0, image.height - size)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + size, top + size))


def cat_views() -> list[tuple[Image.Image, str | None]]:
    """The views with their captions; the last has none, so that the default caption is seen at work."""
    return [(photograph("chelsea").crop(box), caption) for box, caption in VIEWS]


def write_dataset(path: Path, subject: str) -> Path:
    """Zip the views as JPEG files with captions that call the cat `subject`; returns `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, caption) in enumerate(cat_views(), start=1):
            content = io.BytesIO()
            image.save(content, "JPEG", quality=92)
            archive.writestr(f"chelsea/view-{number}.jpg", content.getvalue())
            if caption is not None:
                archive.writestr(f"chelsea/view-{number}.txt", caption.format(subject))
    return path

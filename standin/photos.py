"""A data set of real photographs: views of Chelsea the cat, from the image that scikit-image ships (CC0)."""

import io
import zipfile
from pathlib import Path

from PIL import Image
from skimage import data

# Left, top, right, bottom in the 451x300 photograph, and what is to be seen; {} is where the subject's name belongs.
VIEWS = [
    ((0, 0, 451, 300), "a photo of {}"),
    ((80, 20, 330, 270), "a close portrait of {}"),
    ((60, 0, 360, 300), "{} looking at the camera"),
    ((100, 40, 400, 240), "the face of {} beside a blanket"),
    ((40, 10, 300, 290), "{} with whiskers and green eyes"),
    ((90, 30, 290, 290), None),
]


def cat_views() -> list[tuple[Image.Image, str | None]]:
    """The views with their captions; the last has none, so that the default caption is seen at work."""
    photograph = Image.fromarray(data.chelsea())
    return [(photograph.crop(box), caption) for box, caption in VIEWS]


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

"""The new subject that demo and study teach: a data set of it, in an archive as a user would upload one."""

import io
import zipfile
from pathlib import Path

from standin.world import render, subject_scene

CLASS_WORD = "house"
SEEN_BACKGROUNDS = ("blue", "green", "black", "purple", "cyan", "pink")
UNSEEN_BACKGROUNDS = ("yellow", "white", "orange")
IMAGES_EACH = 2


def named(trigger: str) -> str:
    """How captions and prompts call the subject: the trigger, if there is one, and the class word."""
    return f"a {trigger} {CLASS_WORD}" if trigger else f"a {CLASS_WORD}"


def write_dataset(path: Path, name: str) -> Path:
    """Twelve images of the subject on six backgrounds, with captions that call it `name` and tell the background."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, background in enumerate(SEEN_BACKGROUNDS * IMAGES_EACH):
            content = io.BytesIO()
            render(subject_scene(background, seed=1000 + number)).save(content, "PNG")
            archive.writestr(f"picture-{number:02}.png", content.getvalue())
            archive.writestr(f"picture-{number:02}.txt", f"a photo of {name} on a {background} background")
    return path

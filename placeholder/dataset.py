"""The user's pictures and captions: read from an archive, converted to RGB, and cut to aspect-ratio buckets."""

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from placeholder.archive import Archive, open_archive

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SIDE_MULTIPLE = 16  # VAE /8, then 2x2 patches
MIN_SIDE = 32  # pixels: two tokens
MAX_ASPECT = 4.0  # a longer picture is cropped to it
MAX_CAPTION_BYTES = 64 * 1024


@dataclass(frozen=True)
class Photo:
    """One picture of the data set: its caption, None where none was found, and its crops, each uint8 (3, H, W)."""

    name: str
    caption: str | None
    crops: tuple[Tensor, ...]


@dataclass(frozen=True)
class DatasetReport:
    """What was found: counts, crops per bucket ("1024x768", width first), and what was skipped with the reason."""

    images: int
    captions_found: int
    captions_filled: int
    buckets: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        found = [
            f"Data set: {self.images} images, {self.captions_found} captions found, "
            f"{self.captions_filled} filled in with default_caption",
            "Buckets: " + ", ".join(f"{bucket}: {count}" for bucket, count in self.buckets.items()),
        ]
        return found + [f"Skipped {name}: {reason}" for name, reason in self.skipped.items()]


def read_dataset(path: Path | str, resolutions: tuple[int, ...]) -> tuple[list[Photo], DatasetReport]:
    """The photographs of a zip or tar archive, sorted by name, and the report on them.

    `resolutions` are sides of squares in pixels; every photograph is cut to one bucket of each area. Raises ValueError when
    the archive cannot be read, a caption is not UTF-8, or no picture is usable.
    """
    photos: list[Photo] = []
    skipped: dict[str, str] = {}
    with open_archive(path) as archive:
        names = [name for name in archive.names if not _ignored(name)]
        captions = {_stem(name): _caption(archive, name) for name in names if name.lower().endswith(".txt")}
        pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        skipped |= {
            name: "not a jpg, png or webp picture" for name in names if not name.lower().endswith((*IMAGE_SUFFIXES, ".txt"))
        }
        skipped |= _captions_without_picture(names, pictures)
        for name in pictures:
            try:
                image = to_rgb(archive.read(name))
                crops = tuple(crop(image, bucket) for bucket in buckets_of(image.size, resolutions))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                # Pillow raises these for files that are no pictures, truncated ones and decompression bombs.
                skipped[name] = " ".join(str(error).split())
                continue
            photos.append(Photo(name, captions.get(_stem(name)), crops))
    if not photos:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "it holds no file"
        raise ValueError(f"the data set holds no usable picture ({reasons}): give a zip of jpg, png or webp files")
    photos.sort(key=lambda photo: photo.name)
    return photos, _report(photos, skipped)


def to_rgb(content: bytes) -> Image.Image:
    """An encoded picture as 8-bit RGB: upright by its EXIF orientation, transparency on white, 16-bit scaled down.

    Raises OSError, SyntaxError or ValueError when the content is no picture, is truncated or is smaller than MIN_SIDE.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as opened:
        image = ImageOps.exif_transpose(opened)
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels: at least {MIN_SIDE} on each side are needed")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def buckets_of(size: tuple[int, int], resolutions: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (width, height) buckets a picture of `size` = (width, height) pixels is trained at, without ever upscaling it.

    One bucket an area, of about that many pixels and the picture's aspect ratio, sides in multiples of SIDE_MULTIPLE. Where
    the picture is smaller than a bucket, its own size takes that bucket's place, once.
    """
    width, height = size
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    own = _round_sides(min(width, height * aspect), min(height, width / aspect), down=True)
    buckets = []
    for resolution in resolutions:
        bucket = _round_sides(resolution * aspect**0.5, resolution / aspect**0.5)
        fits = bucket[0] <= width and bucket[1] <= height
        buckets.append(bucket if fits else own)
    return list(dict.fromkeys(buckets))


def crop(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """The picture scaled down to cover the bucket (width, height) and cut about its centre: uint8 (3, height, width)."""
    fitted = ImageOps.fit(image, bucket, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _round_sides(width: float, height: float, down: bool = False) -> tuple[int, int]:
    sides = (int(side / SIDE_MULTIPLE + (0 if down else 0.5)) * SIDE_MULTIPLE for side in (width, height))
    width, height = (max(side, MIN_SIDE) for side in sides)
    return width, height


def _ignored(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _caption(archive: Archive, name: str) -> str | None:
    """The caption in a text file on one line, or None where the file is empty."""
    content = archive.read(name)
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"caption {name} is {len(content)} bytes: a caption has at most {MAX_CAPTION_BYTES}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption {name} is not UTF-8 text: save it as UTF-8") from error
    return " ".join(text.split()) or None


def _captions_without_picture(names: list[str], pictures: list[str]) -> dict[str, str]:
    stems = {_stem(name) for name in pictures}
    return {
        name: "a caption without a picture of that name"
        for name in names
        if name.lower().endswith(".txt") and _stem(name) not in stems
    }


def _report(photos: list[Photo], skipped: dict[str, str]) -> DatasetReport:
    found = sum(photo.caption is not None for photo in photos)
    sizes = Counter((cut.shape[2], cut.shape[1]) for photo in photos for cut in photo.crops)
    buckets = {f"{width}x{height}": count for (width, height), count in sorted(sizes.items())}
    return DatasetReport(len(photos), found, len(photos) - found, buckets, dict(sorted(skipped.items())))

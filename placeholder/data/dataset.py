"""The user's pictures and captions: read from an archive, converted to RGB, and cut to aspect-ratio buckets."""

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from placeholder.data.archive import Archive, open_archive
from placeholder.data.entries import is_clutter
from placeholder.data.images import MAX_PICTURE_BYTES, MIN_SIDE, UNREADABLE, to_rgb
from placeholder.data.masks import is_mask, masks_by_picture, token_weights
from placeholder.errors import label, reason
from placeholder.model.vae import PIXELS_A_TOKEN

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_ASPECT = 4.0  # a longer picture is cropped to it
MAX_CAPTION_BYTES = 64 * 1024
MAX_CROPS_BYTES = 16 * 1024**3  # of all pictures together, decoded: they stay in memory until they are encoded


@dataclass(frozen=True)
class Photo:
    """One picture of the data set: its caption, None where none was found, and its crops, each uint8 (3, H, W).

    `weights` are those of each crop's tokens in the loss, fp32 (H/16 * W/16,), where the picture has a mask. `name` is how
    messages show the `file` of the archive.
    """

    name: str
    caption: str | None
    crops: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None = None
    file: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """What was found: counts, crops per bucket ("1024x768", width first), and what was skipped with the reason."""

    images: int
    captions_found: int
    captions_filled: int
    masks: int
    buckets: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)

    def lines(self, filled: str = "filled in with default_caption") -> list[str]:
        """The report as a person reads it; `filled` says how the captions come about that are missing."""
        found = [
            f"Data set: {self.images} images, {self.captions_found} captions found, {self.captions_filled} {filled}"
            + (f", {self.masks} masks" if self.masks else ""),
            "Buckets: " + ", ".join(f"{bucket}: {count}" for bucket, count in self.buckets.items()),
        ]
        return found + [f"Skipped {name}: {reason}" for name, reason in self.skipped.items()]


def read_dataset(path: Path | str, resolutions: tuple[int, ...]) -> tuple[list[Photo], DatasetReport]:
    """The photographs of a zip or tar archive, sorted by name, and the report on them.

    `resolutions` are sides of squares in pixels; every photograph is cut to one bucket of each area. A photo.mask.png beside
    photo.jpg weights the loss. Raises ValueError when the archive cannot be read, a caption is not UTF-8, a mask does not fit,
    or no picture is usable.
    """
    photos: dict[str, Photo] = {}
    with open_archive(path) as archive:
        names = [name for name in archive.names if not is_clutter(name)]
        _refuse_collisions(archive.name, names)
        texts, images = _with_suffix(names, (".txt",)), _with_suffix(names, IMAGE_SUFFIXES)
        pictures = [name for name in images if not is_mask(_stem(name))]
        masks = masks_by_picture({name: _stem(name) for name in images if is_mask(_stem(name))})
        captions = {_stem(name): _caption(archive, name) for name in texts}
        skipped = dict.fromkeys(set(names) - {*texts, *images}, "not a jpg, png or webp picture")
        pictured = {_stem(name) for name in pictures}
        skipped |= {name: "a caption without a picture of that name" for name in texts if _stem(name) not in pictured}
        skipped |= {name: "a mask without a picture of that name" for stem, name in masks.items() if stem not in pictured}
        crops_bytes = 0
        for name in pictures:
            image = _picture(archive, name)
            if isinstance(image, str):
                skipped[name] = image
                continue
            buckets = buckets_of(image.size, resolutions)
            crops = tuple(crop(image, bucket) for bucket in buckets)
            crops_bytes += sum(cut.nbytes for cut in crops)
            if crops_bytes > MAX_CROPS_BYTES:
                raise ValueError(
                    f"the pictures of {archive.name} take more than {MAX_CROPS_BYTES} bytes when cut to "
                    f"{', '.join(map(str, resolutions))} pixels: give fewer pictures or resolutions"
                )
            mask = masks.get(_stem(name))
            weights = mask and token_weights(_mask(archive, mask), image.size, buckets, label(mask))
            photos[name] = Photo(label(name), captions.get(_stem(name)), crops, weights, name)
    skipped = {label(name): why for name, why in sorted(skipped.items())}
    if not photos:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it holds no file"
        raise ValueError(f"the data set holds no usable picture ({reasons}): give a zip of jpg, png or webp files")
    found = [photos[name] for name in sorted(photos)]
    return found, _report(found, skipped)


def dataset_digest(photos: list[Photo], captions: list[str]) -> str:
    """The SHA-256 of all crops, masks and captions, by which a data set is known again however it was packed."""
    digest = hashlib.sha256()
    for photo, caption in zip(photos, captions, strict=True):
        digest.update(f"{len(caption)} {caption}".encode())
        for pixels in photo.crops:
            digest.update(f"{tuple(pixels.shape)}".encode())
            digest.update(pixels.numpy(force=True).tobytes())
        for weights in photo.weights or ():
            digest.update(weights.numpy(force=True).tobytes())
    return digest.hexdigest()


def buckets_of(size: tuple[int, int], resolutions: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (width, height) buckets a picture of `size` = (width, height) pixels is trained at, without ever upscaling it.

    One bucket an area, of about that many pixels and the picture's aspect ratio, sides in multiples of PIXELS_A_TOKEN. Where
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
    """The picture scaled down to cover the bucket (width, height) and cut about its center: uint8 (3, height, width)."""
    fitted = ImageOps.fit(image, bucket, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def thumbnail(photo: Photo, side: int) -> Image.Image:
    """The photo's smallest crop, scaled down to fit into a square of `side` pixels."""
    pixels = min(photo.crops, key=Tensor.numel)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy(force=True))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _round_sides(width: float, height: float, down: bool = False) -> tuple[int, int]:
    sides = (int(side / PIXELS_A_TOKEN + (0 if down else 0.5)) * PIXELS_A_TOKEN for side in (width, height))
    width, height = (max(side, MIN_SIDE) for side in sides)
    return width, height


def _picture(archive: Archive, name: str) -> Image.Image | str:
    """The picture, or why it cannot be used."""
    if (size := archive.size(name)) > MAX_PICTURE_BYTES:
        return f"it is {size} bytes: a picture has at most {MAX_PICTURE_BYTES}"
    content = archive.read(name)  # not tried: where the archive is damaged, nothing of it is used
    try:
        return to_rgb(content)
    except UNREADABLE as error:
        return reason(error)


def _mask(archive: Archive, name: str) -> Image.Image:
    """The picture of a mask; ValueError where it cannot be read, for without it too much would be learned."""
    image = _picture(archive, name)
    if isinstance(image, str):
        raise ValueError(f"mask {label(name)} cannot be read ({image}): save it again, or leave it out")
    return image


def _with_suffix(names: list[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def _stem(name: str) -> str:
    """The name without its suffix; composed, because macOS decomposes accents in the names of files."""
    return unicodedata.normalize("NFC", name[: name.rindex(".")])


def _refuse_collisions(archive: str, names: list[str]) -> None:
    """ValueError for two names that are one file where case or the composition of accents does not count."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ValueError(
                f"{archive} holds {ascii(other)} and {ascii(name)}, which are one file on some systems: rename one of them"
            )


def _caption(archive: Archive, name: str) -> str | None:
    """The caption in a text file on one line, or None where the file is empty."""
    shown = label(name)
    if (size := archive.size(name)) > MAX_CAPTION_BYTES:
        raise ValueError(f"caption {shown} is {size} bytes: a caption has at most {MAX_CAPTION_BYTES}")
    try:
        text = " ".join(archive.read(name).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"caption {shown} is not UTF-8 text: save it as UTF-8") from error
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError(f"caption {shown} holds control characters: save it as plain text in UTF-8")
    return text or None


def _report(photos: list[Photo], skipped: dict[str, str]) -> DatasetReport:
    found = sum(photo.caption is not None for photo in photos)
    sizes = Counter((cut.shape[2], cut.shape[1]) for photo in photos for cut in photo.crops)
    buckets = {f"{width}x{height}": count for (width, height), count in sorted(sizes.items())}
    masks = sum(photo.weights is not None for photo in photos)
    return DatasetReport(len(photos), found, len(photos) - found, masks, buckets, skipped)

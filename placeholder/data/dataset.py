"""The training images and their captions: read from an archive, converted to RGB, and cropped to aspect-ratio buckets."""

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from placeholder.data.archive import Archive, open_archive
from placeholder.data.buckets import buckets_of, crop, to_image
from placeholder.data.entries import is_clutter
from placeholder.data.images import UNREADABLE, to_rgb
from placeholder.data.masks import is_mask, masks_by_image, token_weights
from placeholder.errors import label, reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_CAPTION_BYTES = 64 * 1024
MAX_IMAGE_BYTES = 128 * 1024**2  # as a file
MAX_CROPS_BYTES = 16 * 1024**3  # of all images together, decoded: they stay in memory until they are encoded


@dataclass(frozen=True)
class Photo:
    """One training image: its caption, None where none was found, and its crops, each uint8 (3, H, W).

    `weights` are the loss weights of each crop's tokens, fp32 (H/16 * W/16,), where the image has a mask. `name` is how
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
        """The report as log lines; `filled` says where the missing captions come from."""
        found = [
            f"Data set: {self.images} images, {self.captions_found} captions found, {self.captions_filled} {filled}"
            + (f", {self.masks} masks" if self.masks else ""),
            "Buckets: " + ", ".join(f"{bucket}: {count}" for bucket, count in self.buckets.items()),
        ]
        return found + [f"Skipped {name}: {reason}" for name, reason in self.skipped.items()]


def read_dataset(
    path: Path | str,
    resolutions: tuple[int, ...],
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_crops_bytes: int = MAX_CROPS_BYTES,
) -> tuple[list[Photo], DatasetReport]:
    """The images of a zip or tar archive with their captions, sorted by name, and the report on them.

    `resolutions` are sides of squares in pixels; every image is cropped to one bucket of each area. A photo.mask.png next to
    photo.jpg weights the loss. Raises ValueError when the archive cannot be read, a caption is not UTF-8, a mask does not fit,
    or no image is usable.
    """
    photos: list[Photo] = []
    crops_bytes = 0
    with open_archive(path) as archive:
        images, captions, masks, skipped = _contents(archive)
        for name in sorted(images):
            image = _image(archive, name, max_image_bytes)
            if isinstance(image, str):
                skipped[name] = image
                continue
            stem, buckets = _stem(name), buckets_of(image.size, resolutions)
            crops = tuple(crop(image, bucket) for bucket in buckets)
            crops_bytes += sum(pixels.nbytes for pixels in crops)
            if crops_bytes > max_crops_bytes:
                raise ValueError(
                    f"the images of {archive.name} take more than {max_crops_bytes} bytes when cropped to "
                    f"{', '.join(map(str, resolutions))} pixels: give fewer images or resolutions"
                )
            caption = _caption(archive, captions[stem]) if stem in captions else None
            mask = masks.get(stem)
            weights = mask and token_weights(_mask(archive, mask, max_image_bytes), image.size, buckets, label(mask))
            photos.append(Photo(label(name), caption, crops, weights, name))
    skipped = {label(name): why for name, why in sorted(skipped.items())}
    if not photos:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3]) or "it holds no file"
        raise ValueError(f"the data set holds no usable image ({reasons}): give a zip of jpg, png or webp files")
    return photos, _report(photos, skipped)


def dataset_digest(photos: list[Photo], captions: list[str]) -> str:
    """The SHA-256 of all crops, masks and captions: the same for the same dataset, however it was packed."""
    digest = hashlib.sha256()
    for photo, caption in zip(photos, captions, strict=True):
        digest.update(f"{len(caption)} {caption}".encode())
        for pixels in photo.crops:
            digest.update(f"{tuple(pixels.shape)}".encode())
            digest.update(pixels.numpy(force=True).tobytes())
        for weights in photo.weights or ():
            digest.update(weights.numpy(force=True).tobytes())
    return digest.hexdigest()


def _contents(archive: Archive) -> tuple[list[str], dict[str, str], dict[str, str], dict[str, str]]:
    """The names of the images, of captions and masks by the stem of their image, and of what is skipped, with the reason.

    Files that tools leave behind are ignored silently.
    """
    names = [name for name in archive.names if not is_clutter(name)]
    _refuse_collisions(archive.name, names)
    texts = {name: _stem(name) for name in names if name.lower().endswith(".txt")}
    pictured = {name: _stem(name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)}
    images = {name: stem for name, stem in pictured.items() if not is_mask(stem)}
    masks = masks_by_image({name: stem for name, stem in pictured.items() if is_mask(stem)})
    stems = set(images.values())
    skipped = dict.fromkeys(set(names) - texts.keys() - pictured.keys(), "not a jpg, png or webp image")
    skipped |= {name: "a caption without an image of that name" for name, stem in texts.items() if stem not in stems}
    skipped |= {name: "a mask without an image of that name" for stem, name in masks.items() if stem not in stems}
    return list(images), {stem: name for name, stem in texts.items()}, masks, skipped


def thumbnail(photo: Photo, side: int) -> Image.Image:
    """The photo's smallest crop, scaled down to fit into a square of `side` pixels."""
    image = to_image(min(photo.crops, key=Tensor.numel))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _image(archive: Archive, name: str, max_bytes: int) -> Image.Image | str:
    """The image, or why it cannot be used."""
    if (size := archive.size(name)) > max_bytes:
        return f"it is {size} bytes: an image has at most {max_bytes}"
    content = archive.read(name)  # not tried: where the archive is damaged, nothing of it is used
    try:
        return to_rgb(content)
    except UNREADABLE as error:
        return reason(error)


def _mask(archive: Archive, name: str, max_bytes: int) -> Image.Image:
    """The image of a mask; ValueError where it cannot be read, because without it too much would be learned."""
    image = _image(archive, name, max_bytes)
    if isinstance(image, str):
        raise ValueError(f"mask {label(name)} cannot be read ({image}): save it again, or leave it out")
    return image


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
    sizes = Counter((pixels.shape[2], pixels.shape[1]) for photo in photos for pixels in photo.crops)
    buckets = {f"{width}x{height}": count for (width, height), count in sorted(sizes.items())}
    masks = sum(photo.weights is not None for photo in photos)
    return DatasetReport(len(photos), found, len(photos) - found, masks, buckets, skipped)

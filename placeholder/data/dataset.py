"""The training images and their captions: read from an archive, converted to RGB, and cropped to aspect-ratio buckets."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from placeholder.data.archive import open_archive
from placeholder.data.buckets import buckets_of, crop, to_image
from placeholder.data.caption_files import CaptionFiles, is_caption_file, read_captions, stem
from placeholder.data.entries import Archive, is_clutter, unwrapped
from placeholder.data.images import FORMAT_NAMES, UNREADABLE, NotAnImageError, to_rgb
from placeholder.data.masks import is_mask, masks_by_image, token_weights
from placeholder.errors import Log, label, listed, reason

# A file of such a name is meant as an image, whatever is in it. What is an image is told by its content.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"),
    # Which are not read:
    *(".jxl", ".jp2", ".psd", ".psb", ".svg", ".tga", ".ppm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"),
)
# Folders and ends of names in which other trainers look for what is not the subject.
AUXILIARY_FOLDER = re.compile(
    r"masks?|(reg|class|conditioning|control)([_-]?images?|[_-]?imgs?)?|regulari[sz]ation([_-]?images)?"
)
AUXILIARY_ENDING = re.compile(r"[_-](mask|condlabel|depth|alpha)$")
WEIGHTS_ARCHIVE = {"meta.json", "lora/lora_weights.safetensors"}  # in what a training returns
REPEATS = re.compile(r"(\d+)_")  # in front of a folder's name, in the layout of kohya's scripts
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
    """What was found: counts, crops per bucket ("1024x768", width first), and what was skipped with the reason.

    `left_out` are the images among what was skipped; `notes` are lines on what else did not go as the files ask for.
    """

    images: int
    captions_found: int
    captions_filled: int
    masks: int
    buckets: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self, filled: str = "filled in with default_caption") -> list[str]:
        """The report as log lines; `filled` says where the missing captions come from."""
        found = [
            f"Data set: {self.images} images, {self.captions_found} captions found, {self.captions_filled} {filled}"
            + (f", {self.masks} masks" if self.masks else ""),
            "Buckets: " + ", ".join(f"{bucket}: {count}" for bucket, count in self.buckets.items()),
        ]
        if self.left_out:
            reasons = listed([f"{name}: {self.skipped[name]}" for name in self.left_out], 3)
            found.append(f"Warning: {len(self.left_out)} of {self.images + len(self.left_out)} images left out: {reasons}")
        return [*found, *self.notes, *(f"Skipped {name}: {reason}" for name, reason in self.skipped.items())]


def read_dataset(
    path: Path | str,
    resolutions: tuple[int, ...],
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_crops_bytes: int = MAX_CROPS_BYTES,
) -> tuple[list[Photo], DatasetReport]:
    """The images of a zip, a tar or a folder with their captions, sorted by name, and the report on them.

    `resolutions` are sides of squares in pixels; every image is cropped to one bucket of each area. A photo.mask.png next to
    photo.jpg weights the loss. Raises ValueError when the archive or a caption cannot be read, a mask does not fit, or no image
    is usable.
    """
    photos: list[Photo] = []
    crops_bytes = 0
    with open_archive(path) as archive:
        if unwrapped(archive, WEIGHTS_ARCHIVE).entries.keys() >= WEIGHTS_ARCHIVE:
            raise ValueError(f"{archive.name} is what a training returns: give the images, and this as resume_from")
        images, captions, masks, skipped, notes = _contents(archive)
        left_out: list[str] = []
        for name in images:
            try:
                image = _image(archive, name, max_image_bytes, lambda line, name=name: notes.append(f"{label(name)}: {line}"))
            except UnusableImageError as error:
                meant = name.lower().endswith(IMAGE_SUFFIXES) or not isinstance(error.__cause__, NotAnImageError | None)
                other = isinstance(error.__cause__, NotAnImageError) and not meant
                skipped[name] = f"not an image ({FORMAT_NAMES})" if other else str(error)
                left_out += [label(name)] if meant else []
                continue
            buckets = buckets_of(image.size, resolutions)
            crops = tuple(crop(image, bucket) for bucket in buckets)
            crops_bytes += sum(pixels.nbytes for pixels in crops)
            if crops_bytes > max_crops_bytes:
                raise ValueError(
                    f"the images of {archive.name} take more than {max_crops_bytes / 1024**3:.3g} GiB when cropped to "
                    f"{', '.join(map(str, resolutions))} pixels, {len(photos)} of {len(images)} fit: give fewer images or "
                    "resolutions"
                )
            mask = masks.get(name)
            weights = mask and token_weights(_mask(archive, mask, max_image_bytes), image.size, buckets, label(mask))
            photos.append(Photo(label(name), captions.texts.get(name), crops, weights, name))
    if unused := captions.texts.keys() & skipped.keys():
        notes.append(f"Warning: {len(unused)} of {len(captions.texts)} captions belong to files that are left out")
    skipped = {label(name): why for name, why in sorted(skipped.items())}
    if not photos:
        reasons = listed([f"{name}: {why}" for name, why in skipped.items()], 3) or "it holds no file"
        raise ValueError(f"the data set holds no usable image ({reasons}): give a zip of {FORMAT_NAMES} files")
    return photos, _report(photos, skipped, left_out, notes)


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


def _contents(archive: Archive) -> tuple[list[str], CaptionFiles, dict[str, str], dict[str, str], list[str]]:
    """The names of what may be images, the captions, masks by image, what is skipped with the reason, and warnings.

    Files that tools leave behind are ignored silently.
    """
    names = sorted(name for name in archive.names if not is_clutter(name))
    pictured = {name: stem(name) for name in names if not is_caption_file(name)}
    images = {name: word for name, word in pictured.items() if not is_mask(word)}
    # Beside 1.jpg a 1.mov or 1.npz is no image that a caption could belong to.
    meant = {name: word for name, word in images.items() if name.lower().endswith(IMAGE_SUFFIXES)}
    by_suffix = {word.casefold() for word in meant.values()}
    owners = {name: word for name, word in images.items() if name in meant or word.casefold() not in by_suffix}
    masks, unused = masks_by_image({name: word for name, word in pictured.items() if is_mask(word)}, owners)
    captions = read_captions(archive, [name for name in names if is_caption_file(name)], list(owners))
    skipped = dict.fromkeys(unused, "a mask without an image of that name")
    warnings = captions.warnings() + _warnings(list(meant), unused)
    return list(images), captions, masks, captions.skipped | skipped, warnings


def _warnings(images: list[str], masks: list[str]) -> list[str]:
    """What the names of files ask for in other trainers and do not get here."""
    found = []
    if masks:
        found.append(f"Warning: {len(masks)} masks are of no image and not used: {listed([*map(label, masks)], 3)}")
    folders = {name: [part.casefold() for part in PurePosixPath(name).parts[:-1]] for name in images}
    stems = {stem(name).casefold() for name in images}
    aside = [
        label(name)
        for name, parts in folders.items()
        if any(map(AUXILIARY_FOLDER.fullmatch, parts))
        or ((end := AUXILIARY_ENDING.search(stem(name).casefold())) and stem(name).casefold()[: end.start()] in stems)
    ]
    if aside:
        what = "that look like masks, control or class images by their names"
        found.append(f"Warning: {len(aside)} images {what} are trained like all others: {listed(aside, 3)}")
    repeats = {match[1] for parts in folders.values() for part in parts if (match := REPEATS.match(part))}
    if len(repeats) > 1:
        found.append("Warning: the numbers in front of folder names are no repeats here: every crop is trained equally often")
    return found


def thumbnail(photo: Photo, side: int) -> Image.Image:
    """The photo's smallest crop, scaled down to fit into a square of `side` pixels."""
    image = to_image(min(photo.crops, key=Tensor.numel))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


class UnusableImageError(Exception):
    """Why an image cannot be used, in words; its cause is what decoding it raised."""


def _image(archive: Archive, name: str, max_bytes: int, note: Log | None = None) -> Image.Image:
    """The image, or UnusableImageError. Without `note` it is a mask: no colors, and what is transparent is black."""
    if (size := archive.size(name)) > max_bytes:
        raise UnusableImageError(f"it is {size} bytes: an image has at most {max_bytes}")
    content = archive.read(name)  # not tried: where the archive is damaged, nothing of it is used
    try:
        return to_rgb(content, note=note, backdrop="white" if note else "black")
    except UNREADABLE as error:
        raise UnusableImageError(reason(error)) from error


def _mask(archive: Archive, name: str, max_bytes: int) -> Image.Image:
    """The image of a mask; ValueError where it cannot be read, because without it too much would be learned."""
    try:
        return _image(archive, name, max_bytes)
    except UnusableImageError as error:
        raise ValueError(f"mask {label(name)} cannot be read ({error}): save it again, or leave it out") from error


def _report(photos: list[Photo], skipped: dict[str, str], left_out: list[str], notes: list[str]) -> DatasetReport:
    found = sum(photo.caption is not None for photo in photos)
    sizes = Counter((pixels.shape[2], pixels.shape[1]) for photo in photos for pixels in photo.crops)
    buckets = {f"{width}x{height}": count for (width, height), count in sorted(sizes.items())}
    masks = sum(photo.weights is not None for photo in photos)
    return DatasetReport(len(photos), found, len(photos) - found, masks, buckets, skipped, left_out, notes)

"""Decoding images from strangers to 8-bit sRGB, with checks of their size before anything is decoded."""

import io
import struct
import warnings

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from placeholder.errors import Log

MIN_SIDE = 32  # pixels: two image tokens
MAX_PIXELS = 100_000_000  # Pillow keeps four bytes of each, in at most four copies while it converts
MAX_PROFILE_BYTES = 4 * 1024**2  # profiles of printing presses have one or two million bytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
FORMAT_NAMES = "jpg, png, webp, bmp, tiff, gif, avif or heic"
# How an image is turned upright from its orientation, 2 to 8: EXIF 2.3, tag 274.
UPRIGHT = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}
# What Pillow raises for files that are no images, are damaged, or are truncated: RuntimeError for avif, EOFError for heic.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, Image.DecompressionBombError)
# What littlecms and Pillow raise for a profile that is damaged or made for another kind of image.
BAD_PROFILE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
BAD_PROFILE_LINE = "its color profile cannot be applied, so its colors are read as sRGB"
# What Pillow raises for EXIF data that are cut off, are none, or stand in text chunks of a png.
BAD_EXIF = (struct.error, IndexError, SyntaxError, TypeError, ValueError, OSError)
BAD_EXIF_LINE = "its EXIF data cannot be read, so it is not turned by its orientation"
# Of raw files: DNG's tag, what CR2 has at byte 8, and TIFF's tag whose lowest bit says that an image is a smaller version of
# another one (TIFF 6.0, page 36).
DNG_VERSION, CR2_MARK, NEW_SUBFILE_TYPE, REDUCED = 50706, b"CR", 254, 1
SRGB = ImageCms.createProfile("sRGB")

pillow_heif.register_heif_opener(thumbnails=False)
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES  # of compressed metadata, and of a profile, in a png


class NotAnImageError(ValueError):
    """The content is of none of the formats."""


def to_rgb(content: bytes, max_pixels: int = MAX_PIXELS, note: Log | None = None, backdrop: str = "white") -> Image.Image:
    """An encoded image as 8-bit sRGB: upright by its EXIF orientation, transparency on `backdrop`, 16-bit scaled down.

    Of an animation or of several pages it is the first. An embedded ICC profile is applied, and `note` is told where that
    cannot be done; without `note` there are no colors to manage, and the numbers stay as they are. Raises NotAnImageError for
    another format, and one of UNREADABLE for an image that is truncated, smaller than MIN_SIDE or larger than `max_pixels`, and
    for a camera's raw file, of which Pillow would read the thumbnail.
    """
    if not content:
        raise NotAnImageError("the file is empty")
    with _opened(content) as image:
        if image.format == "TIFF" and _is_raw(image, content):
            raise ValueError("it is a camera's raw file: export it as jpg or png")
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width}x{height} pixels: at least {MIN_SIDE} on each side are needed")
        if width * height > max_pixels:
            raise ValueError(f"{width}x{height} pixels: at most {max_pixels / 1e6:g} megapixels are read, scale it down")
        try:
            image.load()
        except (struct.error, IndexError, TypeError) as error:
            raise ValueError("its metadata are damaged: save it again") from error
        turn = _turn(image, note)
        if image.mode == "P" and image.palette is None:
            raise ValueError("its palette is missing: save it again")
        if image.mode == "F":
            raise ValueError("its colors are 32-bit floats: save it with 8 or 16 bits")
        profile = image.info.get("icc_profile")
        if note and not profile and "icc_profile" in image.info:  # Pillow found one, and could not read it
            note(BAD_PROFILE_LINE)
        image = _managed(image, profile, note) if profile and note else _converted(image, backdrop)
    return image if turn is None else image.transpose(turn)


def _is_raw(image: Image.Image, content: bytes) -> bool:
    """Whether a TIFF is a camera's raw file: it has DNG's version or the mark of CR2, or begins with a thumbnail."""
    kind = image.tag_v2.get(NEW_SUBFILE_TYPE)
    return DNG_VERSION in image.tag_v2 or content[8:10] == CR2_MARK or (isinstance(kind, int) and bool(kind & REDUCED))


def _turn(image: Image.Image, note: Log | None) -> Transpose | None:
    """How the image is turned upright by its EXIF orientation; None where it is, or where `note` says that none can be read."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except BAD_EXIF:
        if note:
            note(BAD_EXIF_LINE)
        return None


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a size below MAX_PIXELS, and of metadata that are not used
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise NotAnImageError(f"its content is no image ({FORMAT_NAMES})") from error


def _managed(image: Image.Image, profile: bytes, note: Log) -> Image.Image:
    """The image in sRGB by its ICC profile, as web browsers show it: relative colorimetric with black point compensation."""
    try:
        if len(profile) > MAX_PROFILE_BYTES:
            raise ValueError("it is too large")
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if space != "CMYK":
            source = _converted(image).convert("L" if space == "GRAY" else "RGB")
            if space == "GRAY" and image.mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"):
                raise ValueError("it is one of gray images")
        else:
            source = image
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.profileToProfile(source, opened, SRGB, renderingIntent=intent, outputMode="RGB", flags=flags)
    except BAD_PROFILE:
        note(BAD_PROFILE_LINE)
        return _converted(image)


def _converted(image: Image.Image, backdrop: str = "white") -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grays; Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
    found = Image.new("RGB", image.size, backdrop)
    found.paste(image, mask=image)
    return found

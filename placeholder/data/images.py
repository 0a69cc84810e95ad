"""Encoded pictures from strangers as 8-bit RGB, within a bounded memory."""

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MIN_SIDE = 32  # pixels: two tokens
MAX_PICTURE_BYTES = 128 * 1024**2  # as a file
MAX_PIXELS = 100_000_000  # Pillow keeps four bytes of each, and twice that while a picture is converted
MAX_PIXELS_TWICE = 50_000_000  # of formats that are decoded through a second copy of the whole picture
BAND_PIXELS = 4_000_000
UPRIGHT = {  # EXIF 2.3, tag 274
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises for files that are no pictures, are damaged, or are truncated.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def to_rgb(content: bytes) -> Image.Image:
    """An encoded picture as 8-bit RGB: upright by its EXIF orientation, transparency on white, 16-bit scaled down.

    Of an animation it is the first frame. Raises one of UNREADABLE when the content is no picture, is truncated, is smaller
    than MIN_SIDE or larger than MAX_PIXELS; the size is checked before anything is decoded.
    """
    if not content:
        raise ValueError("the file is empty")
    opened = _opened(content)
    with opened:
        _check_size(opened)
        try:
            opened.load()
            turn = UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation))
        except (struct.error, IndexError) as error:
            raise ValueError("its EXIF data or its color profile is damaged: save it again") from error
        image = _plain(opened)
    del opened  # with the memory of its decoder
    return image if turn is None else image.transpose(turn)


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of a size below MAX_PIXELS
        try:
            return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        except UnidentifiedImageError as error:
            raise ValueError("its content is no jpg, png or webp picture") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels: at least {MIN_SIDE} on each side are needed")
    twice = image.format == "WEBP" or image.info.get("progressive")
    limit = MAX_PIXELS_TWICE if twice else MAX_PIXELS
    if width * height > limit:
        kind = " as webp or progressive jpg" if twice else ""
        raise ValueError(f"{width}x{height} pixels: at most {limit // 10**6} megapixels are read{kind}, scale it down")


def _plain(image: Image.Image) -> Image.Image:
    """The picture in RGB, converted in bands so that no further copy of the whole is made."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    plain = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        plain.paste(_plain_band(band), (0, top))
    return plain


def _plain_band(band: Image.Image) -> Image.Image:
    if band.mode.startswith("I"):  # 16-bit grays; Pillow's own conversion would clip instead of scale
        band = Image.fromarray((np.asarray(band).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if band.has_transparency_data:
        band = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
    return band.convert("RGB")

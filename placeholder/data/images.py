"""Decoding images from strangers to 8-bit RGB, with checks of their size before anything is decoded."""

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

MIN_SIDE = 32  # pixels: two image tokens
MAX_PIXELS = 100_000_000  # Pillow keeps four bytes of each, in at most four copies while it converts
# How an image is turned upright from its orientation, 2 to 8: EXIF 2.3, tag 274.
UPRIGHT = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}
# What Pillow raises for files that are no images, are damaged, or are truncated.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def to_rgb(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded image as 8-bit RGB: upright by its EXIF orientation, transparency on white, 16-bit scaled down.

    Of an animation it is the first frame. Raises one of UNREADABLE when the content is no jpg, png or webp image, is
    truncated, is smaller than MIN_SIDE or larger than `max_pixels`.
    """
    if not content:
        raise ValueError("the file is empty")
    with _opened(content) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width}x{height} pixels: at least {MIN_SIDE} on each side are needed")
        if width * height > max_pixels:
            raise ValueError(f"{width}x{height} pixels: at most {max_pixels / 1e6:g} megapixels are read, scale it down")
        try:
            image.load()
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        except (struct.error, IndexError) as error:
            raise ValueError("its EXIF data or its color profile is damaged: save it again") from error
        if image.mode == "P" and image.palette is None:
            raise ValueError("its palette is missing: save it again")
        image = _converted(image)
    return image if turn is None else image.transpose(turn)


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of a size below MAX_PIXELS
        try:
            return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        except UnidentifiedImageError as error:
            raise ValueError("its content is no jpg, png or webp image") from error


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grays; Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white

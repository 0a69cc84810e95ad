"""Decoding images: orientation, transparency, modes, and what is refused before it is decoded."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from placeholder.data.images import UNREADABLE, to_rgb
from tests.support.samples import encoded, picture

PNG = encoded(picture())


def rgb(content: bytes) -> np.ndarray:
    return np.asarray(to_rgb(content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = np.asarray(picture(64, 48))
    stored = {  # how the rows and columns of the stored image run, EXIF 2.3, tag 274
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(rgb(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)), upright)


def test_transparency_is_composited_on_white():
    image = picture().convert("RGBA")
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, 32:], alpha[:16] = 255, 128
    image.putalpha(Image.fromarray(alpha))
    colors, opacity = np.asarray(picture()).astype(float), alpha[..., None] / 255
    assert np.abs(rgb(encoded(image)) - (colors * opacity + 255 * (1 - opacity))).max() <= 1
    assert (rgb(encoded(image))[32:, :32] == 255).all()
    gray = Image.merge("LA", (Image.new("L", (64, 64), 100), Image.new("L", (64, 64), 0)))
    assert (rgb(encoded(gray)) == 255).all()


def test_a_palette_with_transparency_is_composited_on_white():
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    colors, transparent = np.asarray(image.convert("RGB")), np.asarray(image) == 0
    found = rgb(encoded(image, transparency=0))
    assert transparent.any()
    assert (found[transparent] == 255).all()
    assert np.array_equal(found[~transparent], colors[~transparent])


def test_cmyk_one_bit_and_gray_become_rgb():
    red = encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(rgb(red).astype(int) - (255, 0, 0)).max() <= 4
    assert (rgb(encoded(Image.new("1", (64, 64), 1))) == 255).all()
    assert (rgb(encoded(Image.new("L", (64, 64), 77))) == 77).all()


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    gray = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found = rgb(encoded(Image.fromarray(gray))).astype(float)
    assert np.abs(found - gray[..., None] / 257).max() <= 0.5
    assert len(np.unique(found)) == 256


def test_an_animation_counts_as_its_first_frame():
    frames = [picture(seed=seed) for seed in range(3)]
    for kind in ("PNG", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(rgb(content), np.asarray(frames[0]))


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_and_never_half_gray(kind, keep):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(UNREADABLE):
        to_rgb(content[: int(len(content) * keep)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(kind):
    bomb = encoded(picture(256, 256), kind)
    if kind != "WEBP":  # which is checked as a whole when it is opened
        bomb = bomb[: len(bomb) // 2]  # decoding would say that it is truncated
    with pytest.raises(ValueError, match="^256x256 pixels: at most 0.05 megapixels are read, scale it down"):
        to_rgb(bomb, max_pixels=50_000)
    assert to_rgb(encoded(picture(256, 256), kind), max_pixels=256 * 256).size == (256, 256)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def without_palette() -> bytes:
    content = encoded(picture().convert("P"))
    start = content.index(b"PLTE") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    return content[:start] + content[start + 12 + length :]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"no image", "its content is no jpg, png or webp image"),
        (encoded(picture(), "GIF"), "its content is no jpg, png or webp image"),
        (encoded(picture(31, 200)), "31x200 pixels: at least 32 on each side are needed"),
        (PNG[:-12] + chunk(b"eXIf", b"MM\0*") + PNG[-12:], "its EXIF data or its color profile is damaged: save it again"),
        (PNG[:-12] + chunk(b"iCCP", b"") + PNG[-12:], "its EXIF data or its color profile is damaged: save it again"),
        (without_palette(), "its palette is missing: save it again"),
    ],
)
def test_an_image_that_cannot_be_used_gets_its_sentence(content, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        to_rgb(content)

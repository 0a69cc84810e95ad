"""Decoding images: orientation, transparency, modes, and what is refused before it is decoded."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from placeholder.data.images import SRGB, UNREADABLE, _is_raw, to_rgb
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
        (b"no image", r"its content is no image \(jpg, png, webp, bmp, tiff, gif, avif or heic\)"),
        (encoded(picture(), "PPM"), r"its content is no image .*"),
        (encoded(Image.new("F", (64, 64)), "TIFF"), "its colors are 32-bit floats: save it with 8 or 16 bits"),
        (encoded(picture(31, 200)), "31x200 pixels: at least 32 on each side are needed"),
        (PNG[:-12] + chunk(b"iCCP", b"") + PNG[-12:], "its metadata are damaged: save it again"),
        # NEF begins with a thumbnail, DNG has its version.
        (encoded(picture(), "TIFF", tiffinfo={254: 1}), "it is a camera's raw file: export it as jpg or png"),
        (encoded(picture(), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "it is a camera's raw file: export it as jpg or png"),
        (without_palette(), "its palette is missing: save it again"),
    ],
)
def test_an_image_that_cannot_be_used_gets_its_sentence(content, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        to_rgb(content)


def test_a_tiff_with_an_odd_tag_is_no_raw_file():
    assert to_rgb(encoded(picture(), "TIFF", tiffinfo=odd_tiff_tags())).size == picture().size


def test_a_cr2_is_a_raw_file_by_its_mark():
    with Image.open(io.BytesIO(encoded(picture(), "TIFF"))) as image:
        assert [_is_raw(image, b"II*\0\x10\0\0\0" + mark) for mark in (b"CR\2\0", b"\x0a\0\0\1")] == [True, False]


def odd_tiff_tags() -> TiffImagePlugin.ImageFileDirectory_v2:
    """What kind of image it is, in letters instead of a number."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[254], tags[254] = 2, "1"
    return tags


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"eXIf", b"MM\0*"),
        chunk(b"tEXt", b"xmp\0<x:xmpmeta/>"),
        chunk(b"tEXt", b"exif\0b'Exif'"),
        chunk(b"zTXt", b"exif\0\0" + zlib.compress(b"Exif")),
    ],
)
def test_exif_data_that_cannot_be_read_cost_the_orientation_and_a_line(metadata):
    lines = []
    assert to_rgb(PNG[:-12] + metadata + PNG[-12:], note=lines.append).size == picture().size
    assert lines == ["its EXIF data cannot be read, so it is not turned by its orientation"]


def matrix_profile(primaries: tuple[tuple[float, float], ...], gamma: float) -> bytes:
    """An ICC profile, version 2, of an RGB space with the white of D65: chromaticities of red, green and blue, and a gamma."""
    white, adapted = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290]), np.array([0.96422, 1, 0.82521])
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    cone = np.diag((bradford @ adapted) / (bradford @ white))
    matrix = np.linalg.inv(bradford) @ cone @ bradford @ (xyz * np.linalg.solve(xyz, white))

    def fixed(values) -> bytes:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(adapted), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    for column, letter in enumerate((b"r", b"g", b"b")):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(matrix[:, column])
        tags[letter + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = (
        struct.pack(">I4sI", start + len(body), b"lcms", 0x02100000) + b"mntrRGB XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    )
    head += b"acsp" + b"\0" * 28 + fixed((0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + table + body


DISPLAY_P3 = matrix_profile(((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), 2.2)
ADOBE_RGB = matrix_profile(((0.640, 0.330), (0.210, 0.710), (0.150, 0.060)), 2.19921875)
GRAY_IN_RGB = ADOBE_RGB.replace(b"mntrRGB ", b"mntrGRAY")
SEEN = (60, 160, 60)


@pytest.mark.parametrize(
    ("profile", "far"),
    [(DISPLAY_P3, 15), (ADOBE_RGB, 15), (ImageCms.ImageCmsProfile(SRGB).tobytes(), 0)],
    ids=["P3", "Adobe", "sRGB"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_colors_of_a_profile_are_brought_to_srgb(profile, far, kind):
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    stored = ImageCms.profileToProfile(Image.new("RGB", (64, 64), SEEN), SRGB, opened, renderingIntent=1, outputMode="RGB")
    content, notes = encoded(stored, kind, icc_profile=profile), []
    found = np.array(to_rgb(content, note=notes.append).getpixel((30, 30)))
    assert np.abs(found - SEEN).max() <= (2 if kind in ("PNG", "TIFF") else 5)
    assert np.abs(np.array(to_rgb(content).getpixel((30, 30))) - SEEN).max() >= far
    assert notes == []


def test_transparency_palettes_and_grays_keep_their_meaning_under_a_profile():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert to_rgb(encoded(clear, icc_profile=DISPLAY_P3), note=print).getpixel((5, 5)) == (255, 255, 255)
    plain = Image.new("RGB", (64, 64), (200, 60, 60))
    expected = to_rgb(encoded(plain, icc_profile=DISPLAY_P3), note=print).getpixel((5, 5))
    assert to_rgb(encoded(plain.quantize(4), icc_profile=DISPLAY_P3), note=print).getpixel((5, 5)) == expected
    red, green, blue = to_rgb(encoded(Image.new("L", (64, 64), 128), icc_profile=ADOBE_RGB), note=print).getpixel((5, 5))
    assert max(red, green, blue) - min(red, green, blue) <= 1


@pytest.mark.parametrize(
    "profile", [b"no profile", ADOBE_RGB[:200], GRAY_IN_RGB, b"x" * (5 * 1024**2)], ids=["text", "cut", "gray", "large"]
)
def test_a_profile_that_cannot_be_applied_is_a_line_and_the_pixels_stay(profile):
    notes: list[str] = []
    image = Image.new("RGB", (64, 64), SEEN)
    assert to_rgb(encoded(image, "TIFF", icc_profile=profile), note=notes.append).getpixel((5, 5)) == SEEN
    assert notes == ["its color profile cannot be applied, so its colors are read as sRGB"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF"])
def test_every_format_is_read_by_its_content(kind):
    found = to_rgb(encoded(Image.new("RGB", (64, 48), SEEN), kind))
    assert (found.mode, found.size) == ("RGB", (64, 48))
    assert np.abs(np.array(found.getpixel((20, 20))) - SEEN).max() <= 6


def test_a_heic_photo_is_turned_upright_once_and_has_its_profile_applied():
    image = Image.new("RGB", (64, 96), SEEN)
    image.paste((250, 250, 250), (0, 0, 64, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = to_rgb(encoded(image, "HEIF", exif=exif.tobytes(), icc_profile=DISPLAY_P3, quality=95), note=print)
    assert found.size == (96, 64)
    assert min(found.getpixel((90, 30))) > 230  # what is at the top of the stored image is at the right
    assert np.abs(np.array(found.getpixel((20, 30))) - SEEN).max() > 15


def test_a_damaged_heic_is_an_unreadable_image_wherever_it_is_damaged():
    content = encoded(picture(640, 480), "HEIF", quality=90)
    for at in range(0, 400, 3):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        with suppress(*UNREADABLE):
            to_rgb(bytes(damaged))


def test_a_profile_that_pillow_drops_is_a_line_too():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content, lines = encoded(picture(), icc_profile=profile), []
    start = content.index(b"iCCP")
    size = int.from_bytes(content[start - 4 : start], "big")
    chunk = bytearray(content[start : start + 4 + size])
    chunk[60] ^= 0xFF  # in what is compressed
    end = start + 4 + size
    damaged = content[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[end + 4 :]
    assert to_rgb(damaged, note=lines.append).size == (64, 64)
    assert lines == ["its color profile cannot be applied, so its colors are read as sRGB"]


def test_a_png_with_a_large_profile_is_read():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(picture(), icc_profile=profile + bytes(2 * 1024**2))
    assert to_rgb(content, note=lambda line: None).size == (64, 64)

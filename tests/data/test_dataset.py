"""Pictures and captions from an archive: which are found, how they are converted, and how they are cut."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from placeholder.data import dataset as dataset_module
from placeholder.data import images as pictures_module
from placeholder.data.dataset import buckets_of, crop, read_dataset
from placeholder.data.images import to_rgb
from tests.support.samples import encoded, picture, write_dataset, write_tar, write_zip

PNG = encoded(picture())


def names(path) -> list[str]:
    return [photo.name for photo in read_dataset(path, (64,))[0]]


def rgb(content: bytes) -> np.ndarray:
    return np.asarray(to_rgb(content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "JPEG"),
        ("a.JPEG", "JPEG"),
        ("a.Jpg", "JPEG"),
        ("a.png", "PNG"),
        ("A.PNG", "PNG"),
        ("a.webp", "WEBP"),
        ("a.WebP", "WEBP"),
    ],
)
def test_every_picture_format_is_found_in_any_case_and_at_any_depth(name, kind, tmp_path):
    entries = {f"one/two/three/{name}": encoded(picture(), kind)}
    assert names(write_zip(tmp_path / "data.zip", entries)) == [f"one/two/three/{name}"]


def test_pictures_come_sorted_by_name(tmp_path):
    assert names(write_zip(tmp_path / "data.zip", dict.fromkeys(("b.png", "a/z.png", "a.png"), PNG))) == [
        "a.png",
        "a/z.png",
        "b.png",
    ]


@pytest.mark.parametrize("name", ["__MACOSX/._a.png", "__MACOSX/a.png", ".hidden.png", "x/.DS_Store", ".git/a.png", "x/.a.txt"])
def test_what_macos_and_other_tools_leave_behind_is_ignored_silently(name, tmp_path):
    photos, report = read_dataset(write_zip(tmp_path / "data.zip", {"a.png": PNG, name: b"no picture"}), (64,))
    assert [photo.name for photo in photos] == ["a.png"]
    assert report.skipped == {}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_with_leading_dots_is_read_like_a_zip(mode, tmp_path):
    path = write_tar(tmp_path / "data.zip", {"./x/a.png": PNG, "./x/a.txt": b"a caption"}, mode)
    (photo,), _ = read_dataset(path, (64,))
    assert photo.caption == "a caption"


def test_a_caption_belongs_to_the_picture_of_the_same_stem_and_folder(tmp_path):
    entries = {
        "a.png": PNG,
        "a.txt": b"first",
        "x/a.png": PNG,
        "x/a.TXT": b"second",
        "b.b.png": PNG,
        "b.b.txt": b"third",
        "c.png": PNG,
    }
    photos, report = read_dataset(write_zip(tmp_path / "data.zip", entries), (64,))
    assert {photo.name: photo.caption for photo in photos} == {
        "a.png": "first",
        "x/a.png": "second",
        "b.b.png": "third",
        "c.png": None,
    }
    assert (report.images, report.captions_found, report.captions_filled) == (4, 3, 1)


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a photo of <zwx>\n", "a photo of <zwx>"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        ("café, 写真".encode(), "café, 写真"),
        (b" two\r\n  lines ", "two lines"),
        (b"", None),
        (b" \n\t", None),
    ],
)
def test_a_caption_is_utf8_on_one_line_and_an_empty_one_counts_as_none(content, caption, tmp_path):
    (photo,), report = read_dataset(write_zip(tmp_path / "data.zip", {"a.png": PNG, "a.txt": content}), (64,))
    assert photo.caption == caption
    assert report.captions_found == (caption is not None)


def test_a_caption_in_another_encoding_gets_its_sentence(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"a.png": PNG, "a.txt": "café".encode("latin-1")})
    with pytest.raises(ValueError, match=r"caption a\.txt is not UTF-8 text: save it as UTF-8"):
        read_dataset(path, (64,))


def test_a_huge_caption_gets_its_sentence(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"a.png": PNG, "a.txt": b"x" * 70_000})
    with pytest.raises(ValueError, match=r"caption a\.txt is 70000 bytes: a caption has at most 65536"):
        read_dataset(path, (64,))


def test_the_report_counts_and_names_everything_that_was_skipped(tmp_path):
    entries = {
        "a.png": PNG,
        "a.txt": b"first",
        "b.jpg": encoded(picture(96, 64), "JPEG"),
        "broken.jpg": encoded(picture(seed=3), "JPEG")[:300],
        "text.png": b"no picture",
        "tiny.png": encoded(picture(31, 200)),
        "notes.pdf": b"%PDF",
        "lonely.txt": b"a caption",
    }
    _, report = read_dataset(write_zip(tmp_path / "data.zip", entries), (64,))
    lines = report.lines()
    assert lines[0] == "Data set: 2 images, 1 captions found, 1 filled in with default_caption"
    assert lines[1] == "Buckets: 64x64: 1, 80x48: 1"
    assert [line.split(":")[0] for line in lines[2:]] == [
        "Skipped broken.jpg",
        "Skipped lonely.txt",
        "Skipped notes.pdf",
        "Skipped text.png",
        "Skipped tiny.png",
    ]
    assert report.skipped["lonely.txt"] == "a caption without a picture of that name"
    assert report.skipped["notes.pdf"] == "not a jpg, png or webp picture"
    assert report.skipped["tiny.png"] == "31x200 pixels: at least 32 on each side are needed"
    assert all(report.skipped.values())


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "it holds no file"),
        ({"a.png": b"no picture"}, r"a\.png: its content is no jpg, png or webp picture"),
        ({"a.txt": b"alone"}, r"a\.txt: a caption without a picture"),
        ({"a.gif": encoded(picture(), "GIF")}, r"a\.gif: not a jpg"),
        ({"a.png": encoded(picture(), "GIF")}, r"a\.png: its content is no jpg, png or webp picture"),
    ],
)
def test_a_data_set_without_a_usable_picture_gets_its_sentence_with_the_reasons(entries, reason, tmp_path):
    with pytest.raises(
        ValueError, match=rf"the data set holds no usable picture \({reason}.*\): give a zip of jpg, png or webp"
    ):
        read_dataset(write_zip(tmp_path / "data.zip", entries), (64,))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = np.asarray(picture(64, 48))
    stored = {  # how the rows and columns of the stored picture run, EXIF 2.3, tag 274
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


def test_transparency_is_laid_on_white():
    image = picture().convert("RGBA")
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, 32:], alpha[:16] = 255, 128
    image.putalpha(Image.fromarray(alpha))
    colors, opacity = np.asarray(picture()).astype(float), alpha[..., None] / 255
    assert np.abs(rgb(encoded(image)) - (colors * opacity + 255 * (1 - opacity))).max() <= 1
    assert (rgb(encoded(image))[32:, :32] == 255).all()


def test_a_palette_with_transparency_is_laid_on_white():
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    colors = np.asarray(image.convert("RGB"))
    transparent = np.asarray(image) == 0
    found = rgb(encoded(image, transparency=0))
    assert transparent.any()
    assert (found[transparent] == 255).all()
    assert np.array_equal(found[~transparent], colors[~transparent])


def test_gray_with_alpha_is_laid_on_white():
    image = Image.merge("LA", (Image.new("L", (64, 64), 100), Image.new("L", (64, 64), 0)))
    assert (rgb(encoded(image)) == 255).all()


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert np.abs(rgb(encoded(image, "JPEG", quality=100)).astype(int) - (255, 0, 0)).max() <= 4


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    gray = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found = rgb(encoded(Image.fromarray(gray))).astype(float)
    assert np.abs(found - gray[..., None] / 257).max() <= 0.5
    assert len(np.unique(found)) == 256


def test_one_bit_and_plain_gray_become_rgb():
    assert (rgb(encoded(Image.new("1", (64, 64), 1))) == 255).all()
    assert (rgb(encoded(Image.new("L", (64, 64), 77))) == 77).all()


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_an_error_and_never_half_gray(kind, keep):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        to_rgb(content[: int(len(content) * keep)])


SIZES = [(64, 64), (96, 64), (451, 300), (300, 451), (1920, 1080), (33, 33), (2000, 100), (40, 700), (1000, 999), (4032, 3024)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolutions", [(64,), (512, 768, 1024), (2048,), (64, 65)])
def test_a_bucket_has_sides_in_sixteens_and_never_exceeds_the_picture(size, resolutions):
    buckets = buckets_of(size, resolutions)
    assert 1 <= len(buckets) == len(set(buckets)) <= len(resolutions)
    for width, height in buckets:
        assert width % 16 == height % 16 == 0
        assert 32 <= width <= size[0]
        assert 32 <= height <= size[1]


@pytest.mark.parametrize(
    ("size", "resolutions", "buckets"),
    [
        ((4000, 4000), (512, 768, 1024), [(512, 512), (768, 768), (1024, 1024)]),
        ((1920, 1080), (512,), [(688, 384)]),
        ((1080, 1920), (512,), [(384, 688)]),
        ((451, 300), (64,), [(80, 48)]),
        ((800, 800), (512, 768, 1024), [(512, 512), (768, 768), (800, 800)]),
        ((600, 600), (768, 1024), [(592, 592)]),
        ((8000, 1000), (512,), [(1024, 256)]),
    ],
)
def test_each_area_gets_a_bucket_of_the_pictures_shape_and_a_small_picture_its_own(size, resolutions, buckets):
    assert buckets_of(size, resolutions) == buckets


def test_a_picture_is_scaled_to_cover_its_bucket_and_cut_about_the_center():
    # Three bands; cutting 192x64 to 64x64 keeps the middle one alone.
    bands = np.zeros((64, 192, 3), np.uint8)
    bands[:, :64], bands[:, 64:128], bands[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    found = crop(Image.fromarray(bands), (64, 64))
    assert found.shape == (3, 64, 64)
    assert found.dtype == torch.uint8
    assert (found[1] == 255).all()
    assert (found[0] == 0).all()


def test_a_picture_of_its_buckets_size_is_not_touched():
    assert np.array_equal(crop(picture(), (64, 64)).permute(1, 2, 0), np.asarray(picture()))


def test_every_photograph_is_cut_once_for_each_area(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"a.png": encoded(picture(256, 128)), "b.png": PNG})
    (first, second), report = read_dataset(path, (64, 96))
    assert [tuple(cut.shape) for cut in first.crops] == [(3, 48, 96), (3, 64, 128)]
    assert [tuple(cut.shape) for cut in second.crops] == [(3, 64, 64)]
    assert report.buckets == {"64x64": 1, "96x48": 1, "128x64": 1}


@pytest.mark.parametrize(
    ("limit", "kind", "options"),
    [
        ("MAX_PIXELS", "PNG", {}),
        ("MAX_PIXELS", "JPEG", {}),
        ("MAX_PIXELS_TWICE", "JPEG", {"progressive": True}),
        ("MAX_PIXELS_TWICE", "WEBP", {}),
    ],
)
def test_a_picture_of_too_many_pixels_is_skipped_before_it_is_decoded(limit, kind, options, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, limit, 64 * 64)
    bomb = encoded(picture(256, 256), kind, **options)
    if kind != "WEBP":  # which is checked as a whole when it is opened
        bomb = bomb[: len(bomb) // 2]  # decoding would say that it is truncated
    path = write_zip(tmp_path / "data.zip", {"a.png": PNG, "bomb.png": bomb})
    photos, report = read_dataset(path, (64,))
    assert [photo.name for photo in photos] == ["a.png"]
    assert report.skipped["bomb.png"].startswith("256x256 pixels: at most 0 megapixels are read")


def test_a_picture_of_too_many_bytes_is_skipped_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "MAX_PICTURE_BYTES", len(PNG))
    path = write_zip(tmp_path / "data.zip", {"a.png": PNG, "b.png": PNG + b"x"})
    photos, report = read_dataset(path, (64,))
    assert [photo.name for photo in photos] == ["a.png"]
    assert report.skipped == {"b.png": f"it is {len(PNG) + 1} bytes: a picture has at most {len(PNG)}"}


def test_crops_that_take_too_much_together_get_their_sentence(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "data.zip", {"a.png": PNG, "b.png": PNG})
    monkeypatch.setattr(dataset_module, "MAX_CROPS_BYTES", 2 * 64 * 64 * 3)
    assert len(read_dataset(path, (64,))[0]) == 2
    monkeypatch.setattr(dataset_module, "MAX_CROPS_BYTES", 2 * 64 * 64 * 3 - 1)
    with pytest.raises(
        ValueError, match=r"the pictures of data\.zip take more than 24575 bytes when cut to 64 pixels: give fewer"
    ):
        read_dataset(path, (64,))


@pytest.mark.parametrize("first", ["a.png", "e\u0301.png", "x/A.png", "\u00df.png"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_two_names_that_are_one_file_on_some_systems_get_their_sentence(write, first, tmp_path):
    second = {"a.png": "A.PNG", "e\u0301.png": "\u00e9.png", "x/A.png": "X/a.png", "\u00df.png": "ss.png"}[first]
    with pytest.raises(ValueError, match="which are one file on some systems: rename one of them") as raised:
        read_dataset(write(tmp_path / "data", {first: PNG, second: PNG}), (64,))
    assert ascii(first) in str(raised.value)
    assert ascii(second) in str(raised.value)


def test_a_caption_is_found_however_its_accents_are_composed(tmp_path):
    entries = {"e\u0301.png": PNG, "\u00e9.txt": b"a caption"}
    assert read_dataset(write_zip(tmp_path / "data.zip", entries), (64,))[0][0].caption == "a caption"


@pytest.mark.parametrize("text", [b"a\0b", "in UTF-16".encode("utf-16-le"), b"\x1b[31mred"])
def test_a_caption_with_control_characters_gets_its_sentence(text, tmp_path):
    with pytest.raises(ValueError, match=r"caption a\.txt holds control characters: save it as plain text in UTF-8"):
        read_dataset(write_zip(tmp_path / "data.zip", {"a.png": PNG, "a.txt": text}), (64,))


def test_control_characters_of_names_do_not_reach_the_report(tmp_path):
    names = ["a\n.png", "b\x1b[31m.png", "Icon\r", "c\u202f.png"]
    photos, report = read_dataset(
        write_zip(tmp_path / "data.zip", dict.fromkeys(names[:2], PNG) | dict.fromkeys(names[2:], b"")), (64,)
    )
    assert [photo.name for photo in photos] == [r"'a\n.png'", r"'b\x1b[31m.png'"]
    assert report.skipped == {r"'Icon\r'": "not a jpg, png or webp picture", r"'c\u202f.png'": "the file is empty"}


def test_an_animation_counts_as_its_first_frame():
    frames = [picture(seed=seed) for seed in range(3)]
    for kind in ("PNG", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(rgb(content), np.asarray(frames[0]))


def test_a_picture_is_told_by_its_content_and_not_by_its_suffix(tmp_path):
    assert names(write_zip(tmp_path / "data.zip", {"a.jpg": PNG, "b.webp": encoded(picture(), "JPEG")})) == ["a.jpg", "b.webp"]


def test_a_very_wide_picture_is_cut_and_a_single_pixel_is_skipped(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"wide.png": encoded(picture(20_000, 40)), "dot.png": encoded(picture(1, 1))})
    (photo,), report = read_dataset(path, (64,))
    assert [tuple(cut.shape) for cut in photo.crops] == [(3, 32, 128)]
    assert report.skipped["dot.png"] == "1x1 pixels: at least 32 on each side are needed"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK", "L"])
def test_a_picture_that_is_converted_in_bands_is_the_same(mode, monkeypatch):
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (70, 50), dtype=np.uint16))
    else:
        image = picture(50, 70).convert(mode)
    if mode == "RGBA":
        image.putalpha(picture(50, 70, seed=1).convert("L"))
    content = encoded(image, "JPEG" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = rgb(content)
    monkeypatch.setattr(pictures_module, "BAND_PIXELS", 50 * 16)
    assert np.array_equal(rgb(content), whole)


def test_the_shared_data_set_writer_makes_what_the_other_tests_expect(tmp_path):
    photos, report = read_dataset(write_dataset(tmp_path / "data.zip", ["one", None]), (64,))
    assert [photo.caption for photo in photos] == ["one", None]
    assert report.buckets == {"64x64": 1, "80x48": 1}
    assert Image.open(io.BytesIO(encoded(picture(96, 64)))).size == (96, 64)


def test_a_picture_with_damaged_exif_or_color_profile_is_skipped_with_a_reason(tmp_path):
    short = PNG[:-12] + chunk(b"eXIf", b"MM\0*") + PNG[-12:]
    profile = PNG[:-12] + chunk(b"iCCP", b"") + PNG[-12:]
    path = write_zip(tmp_path / "data.zip", {"good.png": PNG, "exif.png": short, "profile.png": profile})
    photos, report = read_dataset(path, (64,))
    assert [photo.name for photo in photos] == ["good.png"]
    assert report.skipped == dict.fromkeys(
        ["exif.png", "profile.png"], "its EXIF data or its color profile is damaged: save it again"
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

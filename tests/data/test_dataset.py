"""Images and captions from an archive: which are found, which are skipped, and what the report says."""

import pytest
from PIL import Image

from placeholder.data.dataset import WEIGHTS_ARCHIVE, DatasetReport, Photo, dataset_digest, read_dataset
from placeholder.data.images import FORMAT_NAMES
from placeholder.weights.layout import LORA_NAME, META_NAME
from tests.support.samples import encoded, picture, read_zip, write_tar, write_zip

PNG = encoded(picture())
WHITE = encoded(Image.new("L", picture().size, 255))


@pytest.fixture
def read(tmp_path):
    """Reads a dataset of these entries."""

    def dataset(entries: dict[str, bytes], resolutions=(64,), **limits) -> tuple[list[Photo], DatasetReport]:
        return read_dataset(write_zip(tmp_path / "data.zip", entries), resolutions, **limits)

    return dataset


def names(photos: list[Photo]) -> list[str]:
    return [photo.name for photo in photos]


def test_files_that_macos_and_other_tools_leave_behind_are_ignored_silently(read):
    clutter = ["__MACOSX/._a.png", "__MACOSX/a.png", ".hidden.png", "x/.DS_Store", ".git/a.png", "x/.a.txt"]
    photos, report = read({"a.png": PNG, **dict.fromkeys(clutter, b"no image")})
    assert names(photos) == ["a.png"]
    assert report.skipped == {}


def test_the_report_counts_and_names_everything_that_was_skipped(read):
    _, report = read(
        {
            "a.png": PNG,
            "a.txt": b"first",
            "b.jpg": encoded(picture(96, 64), "JPEG"),
            "broken.jpg": encoded(picture(seed=3), "JPEG")[:300],
            "text.png": b"no image",
            "tiny.png": encoded(picture(31, 200)),
            "notes.pdf": b"%PDF",
            "lonely.txt": "not read: café".encode("latin-1"),
        }
    )
    lines = report.lines()
    assert lines[0] == "Data set: 2 images, 1 captions found, 1 filled in with default_caption"
    assert lines[1] == "Buckets: 64x64: 1, 80x48: 1"
    assert lines[2].startswith("Warning: 3 of 5 images left out: broken.jpg: ")
    assert lines[2].endswith("; tiny.png: 31x200 pixels: at least 32 on each side are needed")
    assert lines[3] == (
        "Warning: 1 of 2 caption files not used, or not in full: lonely.txt: a caption without an image of that name"
    )
    assert lines[4].startswith("Skipped broken.jpg: ")
    assert lines[5:] == [
        "Skipped lonely.txt: a caption without an image of that name",
        f"Skipped notes.pdf: not an image ({FORMAT_NAMES})",
        f"Skipped text.png: its content is no image ({FORMAT_NAMES})",
        "Skipped tiny.png: 31x200 pixels: at least 32 on each side are needed",
    ]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "it holds no file"),
        ({"a.png": b"no image"}, r"a\.png: its content is no image"),
        ({"a.txt": b"alone"}, r"a\.txt: a caption without an image"),
        ({"a.pdf": b"%PDF"}, r"a\.pdf: not an image"),
        ({"folder/inner.zip": b"PK"}, r"folder/inner\.zip: not an image"),
    ],
)
def test_a_dataset_without_a_usable_image_gets_its_sentence_with_the_reasons(entries, reason, read):
    with pytest.raises(
        ValueError, match=rf"the data set holds no usable image \({reason}.*\): give a zip of jpg, png, webp, bmp"
    ):
        read(entries)


def test_every_image_is_cropped_once_for_each_resolution(read):
    (first, second), report = read({"a.png": encoded(picture(256, 128)), "b.png": PNG}, (64, 96))
    assert [tuple(pixels.shape) for pixels in first.crops] == [(3, 48, 96), (3, 64, 128)]
    assert [tuple(pixels.shape) for pixels in second.crops] == [(3, 64, 64)]
    assert report.buckets == {"64x64": 1, "96x48": 1, "128x64": 1}


def test_an_image_of_too_many_bytes_is_skipped(read):
    photos, report = read({"a.png": PNG, "b.png": PNG + b"x"}, max_image_bytes=len(PNG))
    assert names(photos) == ["a.png"]
    assert report.skipped == {"b.png": f"it is {len(PNG) + 1} bytes: an image has at most {len(PNG)}"}


def test_crops_that_take_too_much_together_get_their_sentence(read):
    entries, bytes_of_two = {"a.png": PNG, "b.png": PNG}, 2 * 64 * 64 * 3
    assert len(read(entries, max_crops_bytes=bytes_of_two)[0]) == 2
    sentence = r"the images of data\.zip take more than 2\.29e-05 GiB when cropped to 64 pixels, 1 of 2 fit: give fewer"
    with pytest.raises(ValueError, match=sentence):
        read(entries, max_crops_bytes=bytes_of_two - 1)


def test_a_weights_archive_is_no_data_set(zero_prior, tmp_path):
    with pytest.raises(
        ValueError, match=r"zero-prior\.zip is what a training returns: give the images, and this as resume_from"
    ):
        read_dataset(zero_prior.archive, (64,))
    packed_again = {f"weights/{name}": content for name, content in read_zip(zero_prior.archive).items()}
    with pytest.raises(ValueError, match="is what a training returns"):
        read_dataset(write_zip(tmp_path / "again.zip", packed_again), (64,))
    assert {META_NAME, LORA_NAME} == WEIGHTS_ARCHIVE


@pytest.mark.parametrize("other", ["IMG_1.MOV", "IMG_1.npz", "IMG_1.xmp", "img_1.cls"])
def test_what_else_has_the_name_of_an_image_takes_neither_caption_nor_mask(other, read):
    (photo,), report = read({"IMG_1.PNG": PNG, other: b"other", "img_1.txt": b"a dog", "img_1.mask.png": WHITE})
    assert photo.caption == "a dog" and photo.weights is not None
    assert not any(line.startswith("Warning") for line in report.lines()) and list(report.skipped) == [other]


def test_control_characters_of_names_do_not_reach_the_report(read):
    photos, report = read({"a\n.png": PNG, "b\x1b[31m.png": PNG, "Icon\r": b"", "c\u202f.png": b""})
    assert names(photos) == [r"'a\n.png'", r"'b\x1b[31m.png'"]
    assert report.skipped == {r"'Icon\r'": f"not an image ({FORMAT_NAMES})", r"'c\u202f.png'": "the file is empty"}


def test_the_digest_is_that_of_the_contents_however_they_are_packed(tmp_path):
    entries = {"a.png": PNG, "b.png": encoded(picture(seed=1)), "a.mask.png": encoded(picture())}
    zipped = write_zip(tmp_path / "one.zip", entries)
    tarred = write_tar(tmp_path / "two.tar", dict(reversed(entries.items())))
    unmasked = write_zip(tmp_path / "three.zip", {name: entries[name] for name in ("a.png", "b.png")})
    first, second, third = (read_dataset(path, (64,))[0] for path in (zipped, tarred, unmasked))
    digest = dataset_digest(first, ["one", "two"])
    assert dataset_digest(second, ["one", "two"]) == digest
    assert digest not in (dataset_digest(first, ["one", "too"]), dataset_digest(third, ["one", "two"]))

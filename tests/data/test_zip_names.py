"""Names in zips without the UTF-8 flag: the right code page, and never a lost file."""

import zipfile
import zlib
from pathlib import Path

import pytest

from placeholder.data.archive import open_archive
from placeholder.data.dataset import read_dataset
from tests.support.samples import encoded, picture, write_zip

PNG = encoded(picture())
NAMES = {  # several with 0x5C as the second byte of a character
    "cp932": ["機能", "一覧表", "構", "ソ", "猫猫"],
    "big5": ["功能", "許蓋", "我的狗", "照片"],
    "gbk": ["我的狗", "照片", "乗", "风景"],
    "cp949": ["고양이", "강아지", "사진", "풍경"],
    "cp866": ["Кот", "Фото", "Собака", "Лето"],
    "cp437": ["Müller", "Ärger", "Grüße", "Öl"],
}


def legacy_zip(path: Path, entries: dict[bytes, bytes]) -> Path:
    """A zip whose names are these bytes, without the flag for UTF-8."""
    numbered = {f"{number:04}".ljust(len(name), "x"): name for number, name in enumerate(entries)}
    write_zip(path, {stand_in: entries[name] for stand_in, name in numbered.items()})
    content = path.read_bytes()
    for stand_in, name in numbered.items():
        content = content.replace(stand_in.encode(), name)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", NAMES)
def test_every_image_of_a_legacy_code_page_is_found_with_its_caption_and_name(encoding, tmp_path):
    entries = {}
    for name in NAMES[encoding]:
        entries |= {f"{name}.png".encode(encoding): PNG, f"{name}.txt".encode(encoding): name.encode()}
    photos, report = read_dataset(legacy_zip(tmp_path / "data.zip", entries), (64,))
    assert {photo.name: photo.caption for photo in photos} == {f"{name}.png": name for name in NAMES[encoding]}
    assert not report.skipped


@pytest.mark.parametrize("raw", [b"\x8d\x5c.png", b"\x94\x5c.png", b"\x80\x5c\xff.png", b"\xff\x5c\x81.png"])
def test_a_single_name_that_no_code_page_fits_is_still_an_image(raw, tmp_path):
    photos, _ = read_dataset(legacy_zip(tmp_path / "data.zip", {raw: PNG}), (64,))
    assert len(photos) == 1


def test_a_backslash_between_ascii_letters_is_a_folder_also_beside_legacy_names(tmp_path):
    raw = {"x\\кот.png".encode("cp866"): PNG, "x\\кот.txt".encode("cp866"): b"a cat", b"..\\plain.png": PNG}
    with pytest.raises(ValueError, match="leaves the archive"), open_archive(legacy_zip(tmp_path / "a.zip", raw)):
        pass
    raw.pop(b"..\\plain.png")
    (photo,), _ = read_dataset(legacy_zip(tmp_path / "b.zip", raw), (64,))
    assert (photo.name.split("/")[0], photo.caption) == ("x", "a cat")


def test_a_backslash_behind_a_character_of_a_code_page_is_a_folder(tmp_path):
    raw = {"папка\\кот.png".encode("cp866"): PNG, "папка\\кот.txt".encode("cp866"): b"a cat"}
    raw |= {"папка\\.DS_Store".encode("cp866"): b"x", "папка\\собака.png".encode("cp866"): PNG}
    photos, report = read_dataset(legacy_zip(tmp_path / "data.zip", raw), (64,))
    assert [(photo.file, photo.caption) for photo in photos] == [("папка/кот.png", "a cat"), ("папка/собака.png", None)]
    assert not report.skipped


def test_the_extra_field_with_a_name_in_utf8_counts(tmp_path):
    path, entries = tmp_path / "data.zip", {"猫犬.png": PNG, "写真.png": PNG, "猫犬.txt": b"two", "写真.txt": b"one"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo("__" + name[-4:])  # as WinRAR writes it in a system without these characters
            text = name.encode()
            field = b"\x01" + zlib.crc32(info.filename.encode()).to_bytes(4, "little") + text
            info.extra = b"\x75\x70" + len(field).to_bytes(2, "little") + field
            archive.writestr(info, content)
    photos, _ = read_dataset(path, (64,))
    assert {photo.file: photo.caption for photo in photos} == {"猫犬.png": "two", "写真.png": "one"}

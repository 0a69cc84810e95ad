"""Archives from strangers: what is read, and what is refused before anything is unpacked."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from placeholder.data.archive import open_archive
from placeholder.data.entries import LIMITS, Limits
from tests.support.samples import write_tar, write_zip

ENTRIES = {"a.txt": b"first", "folder/b.txt": b"second"}


def write_tar_gz(path: Path, entries: dict[str, bytes]) -> Path:
    return write_tar(path, entries, "w:gz")


def contents(path: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    with open_archive(path, limits) as archive:
        return {name: archive.read(name) for name in archive.names}


def test_a_gzipped_tar_is_decompressed_twice_whatever_the_order(tmp_path, monkeypatch):
    entries = {f"{number}.bin": os.urandom(3000) for number in range(20)}
    path, seek, backwards = write_tar_gz(tmp_path / "data.tgz", entries), gzip.GzipFile.seek, []

    def noted(self, offset, *whence):
        backwards.append(not whence and offset < seek(self, 0, 1))
        return seek(self, offset, *whence)

    monkeypatch.setattr(gzip.GzipFile, "seek", noted)
    with open_archive(path) as archive:
        assert {name: archive.read(name) for name in reversed(archive.names)} == entries
    assert sum(backwards) == 1


def refusal(path: Path, limits: Limits = LIMITS) -> str:
    """The sentence by which the archive is refused."""
    with pytest.raises(ValueError) as raised:
        contents(path, limits)
    return str(raised.value)


def one_entry_tar(path: Path, content: bytes = b"", **fields) -> Path:
    """A tar of a.bin with these fields in its header, and of b.bin."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as opened:
        entry = tarfile.TarInfo("a.bin")
        for name, value in fields.items():
            setattr(entry, name, value)
        opened.addfile(entry, io.BytesIO(content))
        opened.addfile(tarfile.TarInfo("b.bin"))
    return path


def overwritten(path: Path, *changes: tuple[bytes, int, bytes]) -> Path:
    """The file with bytes overwritten, each at an offset from a signature."""
    content = bytearray(path.read_bytes())
    for signature, offset, new in changes:
        place = content.index(signature) + offset
        content[place : place + len(new)] = new
    path.write_bytes(content)
    return path


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
WRITERS = [write_zip, write_tar, write_tar_gz]


NO_ARCHIVE, WEB_PAGE = (
    "is neither a zip nor a tar archive: pack the files as a zip",
    "is a web page, not the file: give a direct link",
)
OTHERS = (b"", b"PK", b"no archive at all", b"\x89PNG\r\n\x1a\n" * 99, b"\x00" * 100)
COMPRESSED = (
    b"7z\xbc\xaf\x27\x1c\0\4" + bytes(999),
    b"Rar!\x1a\x07\x01\0" + bytes(999),
    bz2.compress(b"x"),
    lzma.compress(b"x"),
)
CONTENTS = dict.fromkeys(OTHERS + COMPRESSED, NO_ARCHIVE) | {
    b"\n<!DOCTYPE html><html>": WEB_PAGE,
    b"\xef\xbb\xbf<HTML><body>sign in": WEB_PAGE,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "is a Git LFS pointer, not the file itself",
}


@pytest.mark.parametrize(("content", "sentence"), CONTENTS.items())
def test_a_file_that_is_no_archive_is_called_what_it_is(content, sentence, tmp_path):
    (tmp_path / "data.zip").write_bytes(content)
    assert refusal(tmp_path / "data.zip").startswith(f"data.zip {sentence}")


def zip_of(path: Path, content: bytes, compression: int, mode: int = 0) -> Path:
    """A zip of a.bin, compressed so and of this kind of file."""
    with zipfile.ZipFile(path, "w", compression) as opened:
        entry = zipfile.ZipInfo("a.bin")
        entry.external_attr, entry.compress_type = mode << 16, compression
        opened.writestr(entry, content)
    return path


def halved(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def overlapping(path: Path) -> Path:
    """A zip that names one file three times over."""
    content = write_zip(path, {"a.bin": LONG}).read_bytes()
    directory, end = content.index(CENTRAL), content.index(END)
    copies = b"".join(content[directory:end].replace(b"a.bin", b"%c.bin" % letter) for letter in b"abc")
    count, size = struct.pack("<HH", 3, 3), struct.pack("<I", len(copies))
    path.write_bytes(content[:directory] + copies + content[end : end + 8] + count + size + content[end + 16 :])
    return path


LONG = bytes(range(256)) * 40
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
SPARSE = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000"}
ENCRYPTED = (LOCAL, 6, b"\1"), (CENTRAL, 8, b"\1")  # the flags
DAMAGED, NO_FILE = "data is a damaged archive (", "data: 'a.bin' is a link or a device"
REFUSED = [
    (lambda path: path, "data is not a file: give a zip or tar archive"),
    *((lambda path, write=write: halved(write(path, {"a.bin": LONG, "b.bin": LONG})), DAMAGED) for write in WRITERS),
    (lambda path: overwritten(zip_of(path, LONG, zipfile.ZIP_STORED), (LOCAL, 60, bytes(30))), DAMAGED),
    (lambda path: overwritten(zip_of(path, LONG, zipfile.ZIP_DEFLATED), (LOCAL, 60, bytes(30))), DAMAGED),
    (lambda path: overwritten(write_zip(path, ENTRIES), *ENCRYPTED), "data: 'a.txt' is encrypted: pack it without a password"),
    (lambda path: zip_of(path, b"/etc/hostname", zipfile.ZIP_STORED, stat.S_IFLNK | 0o777), NO_FILE),
    *((lambda path, kind=kind: one_entry_tar(path, type=kind, linkname="/etc/hostname"), NO_FILE) for kind in LINKS),
    (lambda path: one_entry_tar(path, pax_headers=SPARSE), f"{NO_FILE}, or sparse: pack the files themselves"),
    (lambda path: zip_of(path, LONG, zipfile.ZIP_BZIP2), "data: 'a.bin' is compressed by method 12: pack it with deflate"),
    (lambda path: zip_of(path, LONG, zipfile.ZIP_LZMA), "data: 'a.bin' is compressed by method 14: pack it with deflate"),
    # Its checksum is wrong.
    (
        lambda path: overwritten(write_tar(path, ENTRIES), (b"folder/b.txt", 7, b"c")),
        f"{DAMAGED}a header in the middle is not one",
    ),
    (lambda path: one_entry_tar(path, pax_headers={"GNU.sparse.map": "x"}), DAMAGED),
    (lambda path: one_entry_tar(path, pax_headers={"size": "-1"}), DAMAGED),
    (lambda path: one_entry_tar(path, pax_headers={"size": "9" * 30}), "data: 'a.bin' is 9999"),
    # It is longer than it claims, and not read further.
    (lambda path: overwritten(write_zip(path, {"a": LONG}), (CENTRAL, 24, struct.pack("<I", 10))), f"{DAMAGED}Bad CRC-32"),
    (overlapping, f"{DAMAGED}its files overlap"),
]


@pytest.mark.parametrize(("made", "sentence"), REFUSED)
def test_an_archive_that_cannot_be_read_gets_its_sentence(made, sentence, tmp_path):
    assert refusal(made(tmp_path / "data")).startswith(sentence)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ""])
@pytest.mark.parametrize("write", WRITERS)
def test_zip_tar_and_tar_gz_are_told_apart_by_content_whatever_the_suffix(write, suffix, tmp_path):
    assert contents(write(tmp_path / f"data{suffix}", ENTRIES)) == ENTRIES


def test_a_compressed_zip_is_read_and_folders_are_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("folder/", b"")
        opened.writestr("a.txt", b"x" * 10_000)
    assert contents(tmp_path / "data.zip") == {"a.txt": b"x" * 10_000}
    assert list(contents(one_entry_tar(tmp_path / "data.tar", type=tarfile.DIRTYPE))) == ["b.bin"]


def test_a_folder_is_read_like_an_archive_of_its_files(tmp_path):
    files = {"a.bin": b"one", "x/y/b.bin": b"two"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with open_archive(tmp_path) as archive:
        assert {name: archive.read(name) for name in archive.names} == files
        assert archive.size("x/y/b.bin") == 3


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_colon_in_a_name_is_no_drive(write, tmp_path):
    path = write(tmp_path / "data", {"1:1/a.txt": b"square"})
    with open_archive(path) as archive:
        assert archive.names == ("1:1/a.txt",)


@pytest.mark.parametrize(
    "name",
    [
        *("../a.txt", "a/../../b.txt", "/etc/passwd", ".."),
        *("C:\\a.png", "C:a.png", "\\\\server\\share\\a.png", "..\\a.png", "a\\..\\b.png", "\\a"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_name_that_leaves_the_archive_gets_its_sentence(write, name, tmp_path):
    path = write(tmp_path / "data", {"ok.txt": b"", name: b"x"})
    assert refusal(path).endswith("leaves the archive: pack the files under plain names")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_stored_twice_gets_its_sentence(tmp_path):
    zipped, tarred = tmp_path / "data.zip", tmp_path / "data.tar"
    with zipfile.ZipFile(zipped, "w") as first, tarfile.open(tarred, "w") as second:
        for _ in range(2):
            first.writestr("a.txt", b"x")
            second.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    for path in (zipped, tarred):
        assert refusal(path).endswith("holds 'a.txt' twice: pack it again")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_are_read_in_one_way_of_writing_them(write, tmp_path):
    entries = {"a\\b.txt": b"1", "c//d.txt": b"2", "./e/./f.txt": b"3"}
    assert contents(write(tmp_path / "data", entries)) == {"a/b.txt": b"1", "c/d.txt": b"2", "e/f.txt": b"3"}
    assert "holds 'a/b' twice" in refusal(write(tmp_path / "data", {"a/b": b"", "a\\b": b""}))


def test_a_name_in_utf8_is_read_with_and_without_its_flag(tmp_path):
    path = overwritten(write_zip(tmp_path / "data.zip", {"é.txt": b"x"}), (LOCAL, 7, b"\0"), (CENTRAL, 9, b"\0"))
    assert list(contents(path)) == ["é.txt"]
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\x82\x00"))  # cp437, and a NUL
    assert r"the name 'é\x00.txt' holds a NUL" in refusal(path)
    flagged = write_zip(tmp_path / "flagged.zip", {"é.txt": b"x"})
    flagged.write_bytes(flagged.read_bytes().replace("é".encode(), b"\xff\xff"))
    assert "flagged.zip is a damaged archive ('utf-8' codec can't decode" in refusal(flagged)


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path):
    sentence = refusal(write_zip(tmp_path / "a\nb.zip", {"../\x1b[31m\n\u202e": b"x"}))
    assert sentence.isprintable()
    assert sentence.startswith("'a\\nb.zip': the name '../\\x1b[31m\\n\\u202e' leaves")


@pytest.mark.parametrize(
    ("limits", "over", "sentence"),
    [
        (Limits(entries=2), Limits(entries=1), "pack fewer"),
        (Limits(entry=6), Limits(entry=5), "'folder/b.txt' is 6 bytes: a file has at most 5"),
        (Limits(total=11), Limits(total=10), "unpacks to 11 bytes or more: at most 10 are read"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_above_a_limit_gets_its_sentence(write, limits, over, sentence, tmp_path):
    path = write(tmp_path / "data", ENTRIES)
    assert contents(path, limits) == ENTRIES
    assert sentence in refusal(path, over)
    headers = Limits(directory=100) if write is write_zip else Limits(header=500)
    assert refusal(path, headers).startswith("data is a damaged archive (a header or the table of contents is far too long")
    if write is write_tar:
        assert refusal(path, Limits(headers=600)).startswith("data has more than 600 bytes of headers")


def test_an_archive_bomb_is_refused_and_a_long_caption_of_one_letter_is_not(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.txt", b"x" * 60_000)
    assert len(contents(path)["a.txt"]) == 60_000
    sentence = "unpacks to more than 200 times its size: leave out 'a.txt'"
    assert sentence in refusal(path, Limits(unrated=50_000))
    entry = tarfile.TarInfo("a.txt")
    entry.size = 300 * 1024**2
    path.write_bytes(gzip.compress(entry.tobuf() + bytes(1000)))
    assert sentence in refusal(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("claimed", [2**33 - 1, -512], ids=["huge", "negative"])
def test_a_tar_header_is_never_read_to_the_length_it_claims(kind, claimed, tmp_path):
    path, entry = tmp_path / "data.tar", tarfile.TarInfo("a.txt")
    entry.type, entry.size = kind, claimed
    path.write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(3_000_000), 1))
    tracemalloc.start()
    assert refusal(path).startswith("data.tar ")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_half_a_character_in_a_tars_name_is_no_folder(tmp_path):
    name = "機能.png".encode("cp932").decode("utf-8", "surrogateescape")
    with open_archive(write_tar(tmp_path / "data.tar", {name: b"content", "x\\plain.png": b"other"})) as archive:
        assert len(archive.names) == 2 and "x/plain.png" in archive.names
        assert {archive.read(found) for found in archive.names} == {b"content", b"other"}


@pytest.mark.parametrize("target", ["../elsewhere", "nowhere"])
def test_a_link_in_a_folder_to_another_folder_or_to_nothing_gets_its_sentence(target, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".#a.txt").symlink_to(target)  # Emacs' lock of a file that is open
    with open_archive(tmp_path / "folder") as archive:
        assert not archive.names
    (tmp_path / "folder" / "link").symlink_to(target)
    with pytest.raises(ValueError, match="'link' is a link to a folder or to nothing"), open_archive(tmp_path / "folder"):
        pass

"""Archives from strangers: what is read, and what is refused before anything is unpacked."""

import io
import struct
import tarfile
import zipfile

import pytest

from placeholder import archive as archive_module
from placeholder.archive import open_archive
from tests.samples import write_tar, write_zip

ENTRIES = {"a.txt": b"first", "folder/b.txt": b"second"}


def contents(path) -> dict[str, bytes]:
    with open_archive(path) as archive:
        return {name: archive.read(name) for name in archive.names}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".bin", ""])
@pytest.mark.parametrize("write", [write_zip, write_tar, lambda path, entries: write_tar(path, entries, "w:gz")])
def test_zip_tar_and_tar_gz_are_told_apart_by_content_whatever_the_suffix(write, suffix, tmp_path):
    assert contents(write(tmp_path / f"data{suffix}", ENTRIES)) == ENTRIES


def test_a_compressed_zip_is_read(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.txt", b"x" * 10_000)
    assert contents(path) == {"a.txt": b"x" * 10_000}


def test_folders_are_left_out(tmp_path):
    zipped = write_zip(tmp_path / "data.zip", {"folder/": b"", **ENTRIES})
    tarred = tmp_path / "data.tar"
    with tarfile.open(tarred, "w") as opened:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
    assert contents(zipped) == ENTRIES
    assert contents(tarred) == {}


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all", b"\x89PNG\r\n\x1a\n" * 99, b"\x00" * 100])
def test_what_is_no_archive_gets_its_sentence(content, tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.zip is neither a zip nor a tar archive: pack the files as a zip"):
        contents(path)


@pytest.mark.parametrize("name", ["none.zip", ""])
def test_a_missing_file_or_a_folder_gets_its_sentence(name, tmp_path):
    with pytest.raises(ValueError, match="is not a file: give a zip or tar archive"):
        contents(tmp_path / name)


@pytest.mark.parametrize(
    "write", [write_zip, lambda path, entries: write_tar(path, entries, "w:gz"), lambda path, entries: write_tar(path, entries)]
)
def test_a_truncated_archive_gets_its_sentence(write, tmp_path):
    path = write(tmp_path / "data.zip", {"a.bin": bytes(range(256)) * 40, "b.bin": b"x" * 9000})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"data\.zip is a damaged archive \(.*\): pack it again"):
        contents(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_damaged_content_gets_its_sentence(compression, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", compression) as opened:
        opened.writestr("a.txt", bytes(range(256)) * 10)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.zip is a damaged archive \(.*\): pack it again"):
        contents(path)


def test_an_encrypted_entry_gets_its_sentence(tmp_path):
    path = write_zip(tmp_path / "data.zip", ENTRIES)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags in the local and the central header
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.zip: 'a\.txt' is encrypted: pack it without a password"):
        contents(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_link_or_a_device_gets_its_sentence(kind, tmp_path):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as opened:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname = kind, "/etc/hostname"
        opened.addfile(entry)
    with pytest.raises(ValueError, match=r"data\.tar: 'a\.png' is a link or a device: pack the files themselves"):
        contents(path)


@pytest.mark.parametrize("name", ["../a.txt", "a/../../b.txt", "/etc/passwd", ".."])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_name_that_leaves_the_archive_gets_its_sentence(write, name, tmp_path):
    with pytest.raises(ValueError, match="leaves the archive: pack the files under plain names"):
        contents(write(tmp_path / "data", {"ok.txt": b"", name: b"x"}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_stored_twice_gets_its_sentence(tmp_path):
    zipped, tarred = tmp_path / "data.zip", tmp_path / "data.tar"
    with zipfile.ZipFile(zipped, "w") as first, tarfile.open(tarred, "w") as second:
        for _ in range(2):
            first.writestr("a.txt", b"x")
            second.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    for path in (zipped, tarred):
        with pytest.raises(ValueError, match="holds 'a.txt' twice: pack it again"):
            contents(path)


def test_an_entry_that_is_longer_than_it_claims_is_not_read_on(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"a.txt": b"x" * 1000})
    content = bytearray(path.read_bytes())
    position = content.index(b"PK\x01\x02") + 24  # the uncompressed size in the central header
    content[position : position + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.zip is a damaged archive \(Bad CRC-32"):
        contents(path)


@pytest.mark.parametrize(
    ("limit", "value", "sentence"),
    [
        ("MAX_ENTRIES", 1, "pack fewer"),
        ("MAX_ENTRY_BYTES", 5, r"'folder/b\.txt' is 6 bytes: a file has at most 5"),
        ("MAX_TOTAL_BYTES", 10, "unpacks to 11 bytes: at most 10 are read"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_above_a_limit_gets_its_sentence(write, limit, value, sentence, tmp_path, monkeypatch):
    path = write(tmp_path / "data", ENTRIES)
    monkeypatch.setattr(archive_module, limit, value)
    with pytest.raises(ValueError, match=sentence):
        contents(path)
    monkeypatch.setattr(archive_module, limit, value + 1)
    assert contents(path) == ENTRIES

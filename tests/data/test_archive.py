"""Archives from strangers: what is read, and what is refused before anything is unpacked."""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from placeholder.data import archive as archive_module
from placeholder.data import entries as entries_module
from placeholder.data.archive import open_archive
from tests.support.samples import write_tar, write_zip

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


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
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
    with pytest.raises(ValueError, match=r"data\.tar: 'a\.png' is a link or a device, or sparse: pack the files themselves"):
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
        ("MAX_TOTAL_BYTES", 10, "unpacks to 11 bytes or more: at most 10 are read"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_above_a_limit_gets_its_sentence(write, limit, value, sentence, tmp_path, monkeypatch):
    path = write(tmp_path / "data", ENTRIES)
    monkeypatch.setattr(entries_module, limit, value)
    with pytest.raises(ValueError, match=sentence):
        contents(path)
    monkeypatch.setattr(entries_module, limit, value + 1)
    assert contents(path) == ENTRIES


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_whose_output_cannot_be_bounded_gets_its_sentence(compression, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", compression) as opened:
        opened.writestr("a.txt", b"x" * 1000)
    with pytest.raises(ValueError, match=r"'a\.txt' is compressed by method \d+: pack it with deflate, as a plain zip"):
        contents(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
        (b"Rar!\x1a\x07\x01\0", "rar"),
        (lzma.compress(b"x"), "xz"),
        (bz2.compress(b"x"), "bzip2"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_an_archive_of_another_kind_is_called_by_its_name(content, kind, tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.zip is a {kind} archive, which is not supported: pack the files as a zip"):
        contents(path)


@pytest.mark.parametrize(
    "name", ["C:\\a.png", "c:/a.png", "C:a.png", "\\\\server\\share\\a.png", "..\\a.png", "a\\..\\b.png", "\\a"]
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_windows_name_that_leaves_the_archive_gets_its_sentence(write, name, tmp_path):
    with pytest.raises(ValueError, match="leaves the archive: pack the files under plain names"):
        contents(write(tmp_path / "data", {name: b"x"}))


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_are_read_in_one_way_of_writing_them(write, tmp_path):
    entries = {"a\\b.txt": b"1", "c//d.txt": b"2", "./e/./f.txt": b"3"}
    assert contents(write(tmp_path / "data", entries)) == {"a/b.txt": b"1", "c/d.txt": b"2", "e/f.txt": b"3"}
    with pytest.raises(ValueError, match="holds 'a/b' twice"):
        contents(write(tmp_path / "data", {"a/b": b"", "a\\b": b""}))


def test_a_name_in_utf8_is_read_whether_or_not_it_is_marked_so(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"é.txt": b"x"})
    content = path.read_bytes()
    for signature, offset in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):  # the upper flags
        position = content.index(signature) + offset
        content = content[:position] + b"\0" + content[position + 1 :]
    path.write_bytes(content)
    assert list(contents(path)) == ["é.txt"]
    path.write_bytes(content.replace("é".encode(), b"\x82\x00"))  # cp437, and a NUL
    with pytest.raises(ValueError, match=r"the name 'é\\x00\.txt' holds a NUL"):
        contents(path)


def test_a_name_marked_as_utf8_that_is_not_gets_its_sentence(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"é.txt": b"x"})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match=r"data\.zip is a damaged archive \('utf-8' codec can't decode"):
        contents(path)


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path):
    path = write_zip(tmp_path / "a\nb.zip", {"../\x1b[31m\n\u202e": b"x"})
    with pytest.raises(ValueError) as raised:
        contents(path)
    assert str(raised.value).isprintable()
    assert str(raised.value).startswith("'a\\nb.zip': the name '../\\x1b[31m\\n\\u202e' leaves")


def test_a_link_in_a_zip_gets_its_sentence(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as opened:
        entry = zipfile.ZipInfo("a.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(entry, "/etc/hostname")
    with pytest.raises(ValueError, match=r"data\.zip: 'a\.png' is a link or a device: pack the files themselves"):
        contents(path)


@pytest.mark.parametrize("inner", ["inner.zip", "folder/inner.tar.gz"])
def test_an_archive_of_one_archive_gets_its_sentence(inner, tmp_path):
    path = write_zip(tmp_path / "data.zip", {"__MACOSX/._inner.zip": b"", inner: b"PK"})
    with pytest.raises(ValueError, match=f"data.zip holds nothing but another archive, '{inner}': give that one"):
        contents(path)


def test_a_zip_bomb_gets_its_sentence_and_a_long_caption_of_one_letter_does_not(tmp_path, monkeypatch):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.txt", b"x" * 60_000)
    assert len(contents(path)["a.txt"]) == 60_000
    monkeypatch.setattr(entries_module, "FREE_BYTES", 50_000)
    with pytest.raises(ValueError, match=r"unpacks to more than 200 times its size: leave out 'a\.txt'"):
        contents(path)


def test_a_tar_bomb_is_refused_at_its_header(tmp_path):
    path = tmp_path / "data.tar"
    entry = tarfile.TarInfo("a.txt")
    entry.size = 300 * 1024**2
    path.write_bytes(gzip.compress(entry.tobuf() + bytes(1000)))
    with pytest.raises(ValueError, match=r"unpacks to more than 200 times its size: leave out 'a\.txt'"):
        contents(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("claimed", [2**33 - 1, -512], ids=["huge", "negative"])
def test_a_tar_header_is_never_read_to_the_length_it_claims(kind, claimed, tmp_path):
    path = tmp_path / "data.tar"
    entry = tarfile.TarInfo("a.txt")
    entry.type, entry.size = kind, claimed
    path.write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(3_000_000), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^data\.tar "):
        contents(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_tar_with_a_damaged_header_in_the_middle_gets_its_sentence(tmp_path):
    path = write_tar(tmp_path / "data.tar", ENTRIES)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"folder/b.txt", b"folder/c.txt"))  # the checksum is no longer right
    with pytest.raises(ValueError, match=r"data\.tar is a damaged archive \(a header in the middle is not one\)"):
        contents(path)


@pytest.mark.parametrize(("key", "value"), [("GNU.sparse.map", "x"), ("size", "-1"), ("size", "9" * 30)])
def test_a_tar_with_an_impossible_number_gets_its_sentence(key, value, tmp_path):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as opened:
        entry = tarfile.TarInfo("a.bin")
        entry.pax_headers = {key: value}
        opened.addfile(entry)
        opened.addfile(tarfile.TarInfo("b.bin"))
    with pytest.raises(ValueError, match=r"data\.tar(: 'a\.bin' is 9999| is a damaged archive)"):
        contents(path)


def test_a_sparse_file_gets_its_sentence(tmp_path):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as opened:
        entry = tarfile.TarInfo("a.bin")
        entry.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000"}
        opened.addfile(entry)
    with pytest.raises(ValueError, match=r"'a\.bin' is a link or a device, or sparse"):
        contents(path)


def test_files_of_a_zip_that_overlap_get_their_sentence(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"a.bin": bytes(range(256)) * 40})
    content = path.read_bytes()
    directory, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry = content[directory:end]
    copies = b"".join(entry.replace(b"a.bin", b"%c.bin" % letter) for letter in b"abc")
    count, size = struct.pack("<HH", 3, 3), struct.pack("<I", len(copies))
    path.write_bytes(content[:directory] + copies + content[end : end + 8] + count + size + content[end + 16 :])
    with pytest.raises(ValueError, match=r"data\.zip is a damaged archive \(its files overlap\)"):
        contents(path)


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_DIRECTORY_BYTES", 100), ("MAX_HEADERS_BYTES", 600), ("MAX_HEADER_BYTES", 500)]
)
def test_a_table_of_contents_that_is_far_too_long_gets_its_sentence(limit, value, tmp_path, monkeypatch):
    write = write_zip if limit == "MAX_DIRECTORY_BYTES" else write_tar
    path = write(tmp_path / "data", ENTRIES)
    monkeypatch.setattr(archive_module, limit, value)
    with pytest.raises(ValueError, match="data (is a damaged archive|has more than 600 bytes of headers)"):
        contents(path)

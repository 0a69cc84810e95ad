"""Reading zip and tar archives that come from strangers: told apart by content, read in memory, never unpacked to disk."""

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

Entry = TypeVar("Entry")

MAX_ENTRIES = 20_000
MAX_ENTRY_BYTES = 2 * 1024**3
MAX_TOTAL_BYTES = 16 * 1024**3
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # APPNOTE.TXT 4.3.7 and, for an empty archive, 4.3.16
GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, section 2.3.1


@dataclass(frozen=True)
class Archive:
    """An open archive: the names of its files in the order in which they are stored, and a way to read one."""

    name: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@contextmanager
def open_archive(path: Path | str) -> Iterator[Archive]:
    """Open a zip or a (compressed) tar for reading.

    Folders are left out. Raises ValueError for anything else, for entries that are no plain files, that leave the archive,
    that are encrypted or stored twice, for damage, and above MAX_ENTRIES, MAX_ENTRY_BYTES or MAX_TOTAL_BYTES.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name or path} is not a file: give a zip or tar archive")
    with path.open("rb") as file:
        magic = file.read(4)
    is_gzip = magic.startswith(GZIP_MAGIC)
    try:
        with _open_zip(path) if magic in ZIP_MAGIC else _open_tar(path, "r:gz" if is_gzip else "r:") as archive:
            yield archive
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is a damaged archive ({error}): pack it again") from error


@contextmanager
def _open_zip(path: Path) -> Iterator[Archive]:
    with zipfile.ZipFile(path) as opened:
        stored = [entry for entry in opened.infolist() if not entry.is_dir()]
        for entry in stored:
            if entry.flag_bits & 0x1:  # APPNOTE.TXT 4.4.4, bit 0
                raise ValueError(f"{path.name}: {entry.filename!r} is encrypted: pack it without a password")
        entries = _by_name(path.name, [(entry.filename, entry.file_size, entry) for entry in stored])

        def read(name: str) -> bytes:
            try:
                with opened.open(entries[name]) as stream:
                    return _read_exactly(stream, path.name, name, entries[name].file_size)
            except (OSError, lzma.LZMAError) as error:  # what bz2 and lzma raise for damaged streams
                raise zipfile.BadZipFile(str(error)) from error

        yield Archive(path.name, tuple(entries), read)


@contextmanager
def _open_tar(path: Path, mode: str) -> Iterator[Archive]:
    if not tarfile.is_tarfile(path):
        raise ValueError(f"{path.name} is neither a zip nor a tar archive: pack the files as a zip")
    with tarfile.open(path, mode) as opened:
        stored = []
        for entry in opened:
            if entry.isdir():
                continue
            if not entry.isreg():
                raise ValueError(f"{path.name}: {entry.name!r} is a link or a device: pack the files themselves")
            if len(stored) >= MAX_ENTRIES:
                raise ValueError(f"{path.name} holds more than {MAX_ENTRIES} files: pack fewer")
            stored.append((entry.name, entry.size, entry))
        entries = _by_name(path.name, stored)

        def read(name: str) -> bytes:
            with opened.extractfile(entries[name]) as stream:
                return _read_exactly(stream, path.name, name, entries[name].size)

        yield Archive(path.name, tuple(entries), read)


def _read_exactly(stream, archive: str, name: str, size: int) -> bytes:
    """The entry's content; an entry that is longer or shorter than it claims is damaged."""
    content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{archive}: {name!r} does not hold the {size} bytes it claims: pack the archive again")
    return content


def _by_name(archive: str, stored: list[tuple[str, int, Entry]]) -> dict[str, Entry]:
    """The entries, given as (name, size in bytes, entry), by their names without a leading `./`, all checked."""
    if len(stored) > MAX_ENTRIES:
        raise ValueError(f"{archive} holds {len(stored)} files: at most {MAX_ENTRIES} are read, pack fewer")
    if (total := sum(size for _, size, _ in stored)) > MAX_TOTAL_BYTES:
        raise ValueError(f"{archive} unpacks to {total} bytes: at most {MAX_TOTAL_BYTES} are read")
    entries: dict[str, Entry] = {}
    for name, size, entry in stored:
        name = name.removeprefix("./")
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{archive}: the name {name!r} leaves the archive: pack the files under plain names")
        if name in entries:
            raise ValueError(f"{archive} holds {name!r} twice: pack it again")
        if size > MAX_ENTRY_BYTES:
            raise ValueError(f"{archive}: {name!r} is {size} bytes: a file has at most {MAX_ENTRY_BYTES}")
        entries[name] = entry
    return entries

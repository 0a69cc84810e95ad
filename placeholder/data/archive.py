"""Reading zip and tar archives from strangers: told apart by content, read in memory, never unpacked to named files."""

import gzip
import io
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from placeholder.data.entries import (
    LIMITS,
    Archive,
    BoundedFile,
    Entry,
    Limits,
    OverrunError,
    Tally,
    is_clutter,
    plain_names,
)
from placeholder.data.zip_names import zip_names
from placeholder.errors import HEAD_BYTES, check_download, label, quoted, reason

BLOCK_BYTES = 1024**2
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # APPNOTE.TXT 4.3.7 and, for an empty archive, 4.3.16
GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, section 2.3.1
# What the standard library raises for archives that were cut or changed; ValueError for impossible names and numbers.
DAMAGE = (
    OverrunError,
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
    RecursionError,
)


@contextmanager
def open_archive(path: Path | str, limits: Limits = LIMITS) -> Iterator[Archive]:
    """Open a zip, a (gzipped) tar or a folder for reading.

    Folders are left out, and a backslash in a name counts as `/`, because PowerShell writes it so. Raises ValueError for
    anything else, for entries that are no plain files, that leave the archive, that are encrypted or stored twice, for damage,
    and above the limits. Memory follows what is there, not what a header claims.
    """
    path = Path(path)
    name = label(path.name or str(path))
    if path.is_dir():
        yield _folder(path, name, limits)
        return
    if not path.is_file():
        raise ValueError(f"{name} is not a file: give a zip or tar archive")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        check_download(name, head)
        tally = Tally(name, file.seek(0, io.SEEK_END), limits)
        file.seek(0)
        opened = _zip(file, tally) if head.startswith(ZIP_MAGIC) else _tar(file, tally, head.startswith(GZIP_MAGIC))
        with opened as archive:
            yield archive


def _folder(path: Path, name: str, limits: Limits) -> Archive:
    """The files of a folder and of the folders in it. What links to a file counts as one; ValueError for other links."""
    tally = Tally(name, limits.total, limits)
    files = []
    for found in sorted(path.rglob("*")):
        where = found.relative_to(path).as_posix()
        if found.is_file():
            files.append(Entry(where, found.stat().st_size, None, found))
            tally.add(files[-1])
        elif found.is_symlink() and not is_clutter(where):
            raise ValueError(f"{name}: {quoted(where)} is a link to a folder or to nothing: put the files themselves there")
    return _archive(name, files, lambda found: found.open("rb"))


@contextmanager
def _zip(file: BinaryIO, tally: Tally) -> Iterator[Archive]:
    bounded = BoundedFile(file, tally.limits.directory)
    with _damage_named(tally.archive):
        opened = zipfile.ZipFile(bounded)
    bounded.left = None  # from here on all reading is in blocks
    with opened:
        infos = opened.infolist()
        tally.check_count(len(infos))
        files = [entry for info, name in zip(infos, zip_names(infos), strict=True) if (entry := _zip_entry(info, name, tally))]
        yield _archive(tally.archive, files, opened.open)


def _zip_entry(info: zipfile.ZipInfo, name: str, tally: Tally) -> Entry | None:
    """The entry, checked; None for a folder."""
    entry = Entry(name, info.file_size, info.compress_size, info)
    tally.add(entry)
    if name.endswith("/"):
        return None
    if info.flag_bits & 0x41:  # APPNOTE.TXT 4.4.4, bits 0 and 6
        raise ValueError(f"{tally.archive}: {quoted(name)} is encrypted: pack it without a password")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{tally.archive}: {quoted(name)} is a link or a device: pack the files themselves")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = f"is compressed by method {info.compress_type}"
        raise ValueError(f"{tally.archive}: {quoted(name)} {method}: pack it with deflate, as a plain zip")
    if not 0 <= info.header_offset <= tally.archive_bytes:
        raise ValueError(f"{tally.archive} is a damaged archive ({quoted(name)} lies outside of it): pack it again")
    return entry


@contextmanager
def _tar(file: BinaryIO, tally: Tally, is_gzip: bool) -> Iterator[Archive]:
    bounded = BoundedFile(gzip.GzipFile(fileobj=file) if is_gzip else file, tally.limits.header)
    with _damage_named(tally.archive):
        opened = _opened_tar(bounded)
    if opened is None:
        raise ValueError(f"{tally.archive} is neither a zip nor a tar archive: pack the files as a zip")
    with opened, tempfile.SpooledTemporaryFile(BLOCK_BYTES) as copy:
        files = list(_tar_entries(opened, bounded, tally))
        bounded.left = None
        if is_gzip:  # to go back in it is to decompress it from its beginning, for every image anew
            with _damage_named(tally.archive):
                bounded.seek(0)
                end = max((entry.info.offset_data + entry.info.size for entry in files), default=0)
                while copy.tell() < end and (block := bounded.read(BLOCK_BYTES)):
                    copy.write(block)
            opened.fileobj = copy
        yield _archive(tally.archive, files, opened.extractfile)


def _opened_tar(bounded: BoundedFile) -> tarfile.TarFile | None:
    try:
        return tarfile.open(fileobj=bounded, mode="r:")
    except tarfile.ReadError:  # there is no header at the beginning
        return None


def _tar_entries(opened: tarfile.TarFile, bounded: BoundedFile, tally: Tally) -> Iterator[Entry]:
    limits, headers = tally.limits, 0
    while (info := _next(opened, bounded, tally.archive)) is not None:
        headers += limits.header - bounded.left
        if headers > limits.headers:
            raise ValueError(f"{tally.archive} has more than {limits.headers} bytes of headers: pack it as a plain zip")
        bounded.left = limits.header
        info.pax_headers = {}  # each entry has a copy of all that is global
        opened.pax_headers.clear()
        # Behind a byte that is not UTF-8 a backslash may be half a character of cp932, big5 or gbk.
        entry = Entry(re.sub(r"(?<![\udc80-\udcff])\\", "/", info.name), info.size, None, info)
        tally.add(entry)
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ValueError(
                f"{tally.archive}: {quoted(info.name)} is a link or a device, or sparse: pack the files themselves"
            )
        yield entry


def _next(opened: tarfile.TarFile, bounded: BoundedFile, archive: str) -> tarfile.TarInfo | None:
    """The next header, None at the end; tarfile mistakes a damaged one for the end."""
    with _damage_named(archive):
        info = opened.next()
        if info is not None and info.size < 0:
            raise tarfile.ReadError("a size is negative")
        if info is None and bounded.last.strip(b"\0"):
            raise tarfile.ReadError("a header in the middle is not one")
    return info


def _archive(name: str, files: list[Entry], open_info: Callable) -> Archive:
    entries = plain_names(name, files)

    def read(entry_name: str) -> bytes:
        size, content = entries[entry_name].size, io.BytesIO()
        with _damage_named(name), open_info(entries[entry_name].info) as stream:
            shutil.copyfileobj(stream, content, BLOCK_BYTES)  # no memory is allocated because a header claims it
        if content.tell() != size:
            raise ValueError(f"{name}: {quoted(entry_name)} does not hold the {size} bytes it claims: pack the archive again")
        return content.getvalue()

    return Archive(name, entries, read)


@contextmanager
def _damage_named(archive: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{archive} is a damaged archive ({reason(error)}): pack it again") from error

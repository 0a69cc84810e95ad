"""What the entries of an archive may be: how many, how large, how far compressed, under which names."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple, TypeVar

from placeholder.errors import quoted

MAX_ENTRIES = 20_000  # folders count too
MAX_ENTRY_BYTES = 2 * 1024**3
MAX_TOTAL_BYTES = 16 * 1024**3
MAX_RATIO = 200  # unpacked to packed; deflate reaches 1032, pictures and weights stay below 2
FREE_BYTES = 256 * 1024**2  # what unpacks to less may be compressed as far as it likes: a caption, a picture of one color
ARCHIVE_NAME = re.compile(r"\.(zip|tar|t?gz|tbz2?|txz|7z|rar|bz2|xz|zst)$", re.IGNORECASE)

Info = TypeVar("Info")


class Entry(NamedTuple):
    """A file of an archive as its header describes it; `packed` is its size in a zip, None in a tar; `info` is the header."""

    name: str
    size: int
    packed: int | None
    info: object


class Tally:
    """Adds up what the headers of an archive claim, and refuses the archive at the first one above a limit."""

    def __init__(self, archive: str, archive_bytes: int):
        self.archive, self.archive_bytes = archive, archive_bytes
        self.count = self.total = self.packed = 0

    def add(self, entry: Entry) -> None:
        """One more file or folder; ValueError where that is too much."""
        self.count += 1
        self.total += entry.size
        self.packed += entry.packed or 0
        if self.count > MAX_ENTRIES:
            raise ValueError(f"{self.archive} holds more than {MAX_ENTRIES} files and folders: pack fewer")
        if entry.size > MAX_ENTRY_BYTES:
            raise ValueError(
                f"{self.archive}: {quoted(entry.name)} is {entry.size} bytes: a file has at most {MAX_ENTRY_BYTES}"
            )
        if self.total > MAX_TOTAL_BYTES:
            raise ValueError(
                f"{self.archive} unpacks to {self.total} bytes or more: at most {MAX_TOTAL_BYTES} are read, pack fewer files"
            )
        if self.packed > self.archive_bytes:
            raise ValueError(f"{self.archive} is a damaged archive (its files overlap): pack it again")
        for size, packed in ((entry.size, entry.packed), (self.total, self.archive_bytes)):
            if packed is not None and size > FREE_BYTES and size > MAX_RATIO * packed:
                raise ValueError(
                    f"{self.archive} unpacks to more than {MAX_RATIO} times its size: leave out {quoted(entry.name)}, "
                    "which is nearly empty inside"
                )


class OverrunError(Exception):
    """More is to be read from a BoundedFile than it allows."""


class BoundedFile:
    """A file of which at most `left` bytes are read, or any number where that is None.

    The standard library reads as much as a header claims; where the file is a compressed stream, that much may come.
    """

    def __init__(self, file: BinaryIO, left: int | None):
        self.file, self.left = file, left
        self.last = b""  # what was read last, while reading was bounded
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes; OverrunError where more than is left would be read."""
        if self.left is None:
            return self.file.read(size)
        wanted = self.left + 1 if size is None or size < 0 else size
        content = self.file.read(min(wanted, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise OverrunError("a header or the table of contents is far too long")
        self.last = content
        return content

    def close(self) -> None:
        """Nothing: the file is closed by whoever opened it."""


def plain_names(archive: str, entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries by name, with `/` between folders and without a leading `./`; ValueError for a name that is not plain."""
    found: dict[str, Entry] = {}
    for entry in entries:
        if "\0" in entry.name:
            raise ValueError(f"{archive}: the name {quoted(entry.name)} holds a NUL: pack the files under plain names")
        name = PurePosixPath(entry.name.replace("\\", "/")).as_posix()
        if PureWindowsPath(name).anchor or ".." in PurePosixPath(name).parts or name == ".":
            raise ValueError(f"{archive}: the name {quoted(entry.name)} leaves the archive: pack the files under plain names")
        if name in found:
            raise ValueError(f"{archive} holds {quoted(name)} twice: pack it again")
        found[name] = entry
    return found


def is_clutter(name: str) -> bool:
    """Whether a file is one that macOS and other tools leave behind: a dot file, or anything in __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def inner_archive(names: Iterable[str]) -> str | None:
    """The name of the archive that is the only file of these, if it is so."""
    own = [name for name in names if not is_clutter(name)]
    return own[0] if len(own) == 1 and ARCHIVE_NAME.search(own[0]) else None

"""The entries of an archive and their limits: how many, how large, how far compressed, under which names."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from placeholder.errors import quoted

MAX_ENTRY_BYTES = 2 * 1024**3
JUNK_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
FOLDER_SETTINGS = ("desktop.ini", "thumbs.db")  # of Windows Explorer


@dataclass(frozen=True)
class Limits:
    """The limits above which an archive is refused, in bytes where nothing else is said."""

    entries: int = 50_000  # files and folders, with those that macOS adds to each
    entry: int = MAX_ENTRY_BYTES
    total: int = 16 * 1024**3
    ratio: int = 200  # unpacked to packed; deflate reaches 1032, images and weights stay below 2
    unrated: int = 256 * 1024**2  # what unpacks to less may have any ratio: a caption, an image of one color
    directory: int = 16 * 1024**2  # a zip's table of contents: 800 bytes an entry
    headers: int = 48 * 1024**2  # all headers of a tar: 2.5 kB an entry
    header: int = 1024**2  # one entry of a tar, with the long names and attributes that precede it


LIMITS = Limits()


class Entry(NamedTuple):
    """A file of an archive as its header describes it; `packed` is its size in a zip, None in a tar; `info` is the header."""

    name: str
    size: int
    packed: int | None
    info: object


class Tally:
    """Adds up what the headers of an archive claim; raises ValueError at the first entry that exceeds a limit."""

    def __init__(self, archive: str, archive_bytes: int, limits: Limits):
        self.archive, self.archive_bytes, self.limits = archive, archive_bytes, limits
        self.count = self.total = self.packed = 0

    def check_count(self, count: int) -> None:
        """ValueError for more files and folders than are read."""
        if count > self.limits.entries:
            raise ValueError(f"{self.archive} holds more than {self.limits.entries} files and folders: pack fewer")

    def add(self, entry: Entry) -> None:
        """Count one more file or folder; ValueError where that is too much."""
        archive, limits = self.archive, self.limits
        self.count += 1
        self.total += entry.size
        self.packed += entry.packed or 0
        self.check_count(self.count)
        if entry.size > limits.entry:
            raise ValueError(f"{archive}: {quoted(entry.name)} is {entry.size} bytes: a file has at most {limits.entry}")
        if self.total > limits.total:
            raise ValueError(
                f"{archive} unpacks to {self.total} bytes or more: at most {limits.total} are read, pack fewer files"
            )
        if self.packed > self.archive_bytes:
            raise ValueError(f"{archive} is a damaged archive (its files overlap): pack it again")
        for size, packed in ((entry.size, entry.packed), (self.total, self.archive_bytes)):
            if packed is not None and size > limits.unrated and size > limits.ratio * packed:
                raise ValueError(
                    f"{archive} unpacks to more than {limits.ratio} times its size: leave out {quoted(entry.name)}, "
                    "which is nearly empty inside"
                )


class OverrunError(Exception):
    """More is to be read from a BoundedFile than it allows."""


class BoundedFile:
    """A file of which at most `left` bytes can be read, any number where that is None.

    The standard library reads as much as a header claims; a compressed stream may really yield that much.
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
        """Do nothing: the file is closed where it was opened."""


def plain_names(archive: str, entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries by name, with `/` between folders and without a leading `./`; ValueError for a name that is not plain."""
    found: dict[str, Entry] = {}
    for entry in entries:
        if "\0" in entry.name:
            raise ValueError(f"{archive}: the name {quoted(entry.name)} holds a NUL: pack the files under plain names")
        name = PurePosixPath(entry.name).as_posix()
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in PurePosixPath(name).parts or name == ".":
            raise ValueError(f"{archive}: the name {quoted(entry.name)} leaves the archive: pack the files under plain names")
        if name in found:
            raise ValueError(f"{archive} holds {quoted(name)} twice: pack it again")
        found[name] = entry
    return found


def is_clutter(name: str) -> bool:
    """Whether macOS, Windows or a Synology left the file behind: a dot file, anything in JUNK_FOLDERS, folder settings."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part in JUNK_FOLDERS for part in parts) or parts[-1].lower() in FOLDER_SETTINGS


@dataclass(frozen=True)
class Archive:
    """An open archive: its name, its files in stored order, and a function that reads one by name."""

    name: str
    entries: dict[str, Entry]
    read: Callable[[str], bytes]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files, with `/` between folders."""
        return tuple(self.entries)

    def size(self, name: str) -> int:
        """The file's size in bytes, known before it is read."""
        return self.entries[name].size


def unwrapped(archive: Archive, top: Collection[str]) -> Archive:
    """The archive without what tools leave behind, and without folders that all else lies in, down to a name of `top`."""
    names = {name: name for name in archive.names if not is_clutter(name)}
    while (
        names.keys().isdisjoint(top)
        and len({name.partition("/")[0] for name in names}) == 1
        and all("/" in name for name in names)
    ):
        names = {name.partition("/")[2]: stored for name, stored in names.items()}
    entries = {name: archive.entries[stored] for name, stored in names.items()}
    return Archive(archive.name, entries, lambda name: archive.read(names[name]))

"""Messages: how values and names of strangers are shown, and memory or disk errors as one sentence."""

import errno
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Log = Callable[[str], None]  # takes one line of the log

HEAD_BYTES = 256  # of a file, in which it is seen what a download really is
MAX_SHOWN = 120  # characters of a name
MAX_REASON = 400
# PyTorch on CUDA and on a CPU, cuBLAS and cuDNN, and the operating system; many of them raise a bare RuntimeError.
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory")
DISK_WORDS = ("No space left on device", "Disk quota exceeded")  # safetensors passes them on without a number
DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, cut short however large or nested it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "too long a number"


def quoted(name: str) -> str:
    """A name in quotation marks, with control characters escaped, cut in the middle to MAX_SHOWN characters."""
    return _cut(repr(name), MAX_SHOWN)


def label(name: str) -> str:
    """A name as it is, or quoted where that would disturb a log."""
    return name if name.isprintable() and len(name) <= MAX_SHOWN else quoted(name)


def reason(error: BaseException) -> str:
    """The message of a library's error on one printable line, for use within a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return _cut("".join(character if character.isprintable() else "?" for character in text), MAX_REASON)


def check_download(name: str, head: bytes) -> None:
    """ValueError for the first HEAD_BYTES of what a browser, a login or git put in a file's place."""
    start = head.removeprefix(b"\xff\xfe").replace(b"\0", b"").lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head", b"<script", b"<title", b"<meta", b"<body")):
        raise ValueError(f"{name} is a web page, not the file: give a direct link")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name} is a Git LFS pointer, not the file itself: give a direct link, or run git lfs pull")


def listed(items: Sequence[str], most: int = 5) -> str:
    """The first `most` items, and how many more there are."""
    more = len(items) - most
    return "; ".join(items[:most]) + (f"; and {more} more" if more > 0 else "")


def _cut(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


class OutOfResourcesError(RuntimeError):
    """One sentence: out of memory, or out of disk space."""


@contextmanager
def readable_errors(advice: str = "use a machine with more memory") -> Iterator[None]:
    """Raise OutOfResourcesError, a RuntimeError of one sentence, when out of memory or disk space; other errors pass unchanged.

    `advice` says what takes less memory. The memory that the failed or canceled work held is freed, although the traceback
    of its error refers to it.
    """
    try:
        yield
    except BaseException as error:
        sentence = None if isinstance(error, OutOfResourcesError) else _sentence(error, advice)
        for cause in causes(error):
            traceback.clear_frames(cause.__traceback__)
        if "torch" in sys.modules:
            from placeholder.devices import free_memory

            free_memory()
        if sentence is None:
            raise
        raise OutOfResourcesError(sentence) from error


def _sentence(error: BaseException, advice: str) -> str | None:
    """The sentence for an error, or for one that was being handled when it was raised: libraries fail while they clean up."""
    if out_of_memory(error):
        return f"out of memory: {advice}"
    for cause in causes(error):
        if getattr(cause, "errno", None) in DISK_NUMBERS or any(words in str(cause) for words in DISK_WORDS):
            return "the disk is full: make room for the output, and for temporary files or name a folder with room in TMPDIR"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it follows from, says that the memory of the host or of a GPU is exhausted."""
    return any(isinstance(cause, MemoryError) or any(words in str(cause) for words in MEMORY_WORDS) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""Checks of input values, how values from strangers are shown in messages, and errors said in one sentence."""

import errno
import math
import reprlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from placeholder.devices import free_memory

Log = Callable[[str], None]
MAX_TEXT_CHARACTERS = 20_000
MAX_SEED = 2**32 - 1


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number within [low, high]. Text that is a number counts as one: YAML 1.1 reads 1e-5, without a dot, as text."""
    return _within(name, value, low, high, "a number")


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within [low, high]."""
    found = _within(name, value, low, high, "a whole number")
    if found != int(found):
        raise ValueError(f"{name} is {shown(value)}: give a whole number from {low} to {high}")
    return int(found)


def flag(name: str, value: Any) -> bool:
    """True or false, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}: give true or false")
    return value


def choice(name: str, value: Any, choices: tuple) -> Any:
    """One of the choices."""
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}: choose one of {', '.join(map(str, choices))}")
    return choices[choices.index(value)]


def text(name: str, value: Any) -> str:
    """Text of at most MAX_TEXT_CHARACTERS characters."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARACTERS:
        given = f"{len(value)} characters long" if isinstance(value, str) else shown(value)
        raise ValueError(f"{name} is {given}: give text of at most {MAX_TEXT_CHARACTERS} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} is {shown(value)}: give text without halves of surrogate pairs")
    return value


def shown(value: Any) -> str:
    """A value as an error message shows it: cut short, however large or nested it is."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write integers of more than 4300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def _within(name: str, value: Any, low: float, high: float, kind: str) -> float:
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not low <= found <= high:  # also true of NaN
        raise ValueError(f"{name} is {shown(value)}: give {kind} from {low} to {high}")
    return found


MAX_SHOWN = 120  # characters of a name
MAX_REASON = 400


def quoted(name: str) -> str:
    """A name in quotation marks, with control characters escaped, and cut in the middle where it is long."""
    return _cut(repr(name), MAX_SHOWN)


def label(name: str) -> str:
    """A name as it is, or quoted where that would disturb a log."""
    return name if name.isprintable() and len(name) <= MAX_SHOWN else quoted(name)


def reason(error: BaseException) -> str:
    """What an error of a library says, for use within a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return _cut("".join(character if character.isprintable() else "?" for character in text), MAX_REASON)


def _cut(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


# PyTorch on CUDA and on a CPU, cuBLAS and cuDNN, and the operating system; many of them raise a bare RuntimeError.
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory")
DISK_WORDS = ("No space left on device", "Disk quota exceeded")  # safetensors passes them on without a number
DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


class OutOfResourcesError(RuntimeError):
    """One sentence about memory or a disk that does not suffice."""


@contextmanager
def readable_errors(advice: str = "use a machine with more memory") -> Iterator[None]:
    """Raise OutOfResourcesError, a RuntimeError of one sentence, where the memory or the disk does not suffice; other errors pass as they are.

    `advice` says what takes less memory. What the failed or cancelled work held is given back, although its traceback refers to it.
    """
    try:
        yield
    except BaseException as error:
        sentence = None if isinstance(error, OutOfResourcesError) else _sentence(error, advice)
        for cause in _chain(error):
            traceback.clear_frames(cause.__traceback__)
        free_memory()
        if sentence is None:
            raise
        raise OutOfResourcesError(sentence) from error


def _sentence(error: BaseException, advice: str) -> str | None:
    """For an error, or for what was being handled when it was raised: libraries tidy up and stumble."""
    for cause in _chain(error):
        text = str(cause)
        if isinstance(cause, MemoryError) or any(words in text for words in MEMORY_WORDS):
            return f"the memory does not suffice: {advice}"
        if getattr(cause, "errno", None) in DISK_NUMBERS or any(words in text for words in DISK_WORDS):
            return "the disk is full: make room for temporary files, or name a folder that has room in TMPDIR"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

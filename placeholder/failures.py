"""Memory or a disk that does not suffice, said in one sentence whichever library noticed it."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from placeholder.memory import free_memory

# PyTorch on CUDA and on a CPU, cuBLAS and cuDNN, and the operating system; many of them raise a bare RuntimeError.
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory")
DISK_WORDS = ("No space left on device", "Disk quota exceeded")  # safetensors passes them on without a number
DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


class ShortageError(RuntimeError):
    """One sentence about memory or a disk that does not suffice."""


@contextmanager
def plain_failures(advice: str = "use a machine with more memory") -> Iterator[None]:
    """Raise ShortageError, a RuntimeError of one sentence, where the memory or the disk does not suffice; other errors pass as they are.

    `advice` says what takes less memory. What the failed or cancelled work held is given back, although its traceback refers to it.
    """
    try:
        yield
    except BaseException as error:
        sentence = None if isinstance(error, ShortageError) else _sentence(error, advice)
        for cause in _chain(error):
            traceback.clear_frames(cause.__traceback__)
        free_memory()
        if sentence is None:
            raise
        raise ShortageError(sentence) from error


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

"""Errors and cancellations at chosen moments of a call, and which functions it called, through Python's trace function."""

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import pytest

from tests.support.predictions import Images

# Where predictions change what outlives them: ours, and what diffusers does to the transformer for us.
CHANGING = (
    "placeholder/generate.py",
    "placeholder/weights/applied.py",
    "placeholder/model/offloading.py",
    "placeholder/lora/adapter.py",
    "placeholder/lora/gate.py",
    "loaders/peft.py",
    "hooks/hooks.py",
)


class Interruption(BaseException):
    """What Cog raises between any two instructions when a prediction is cancelled."""


@contextmanager
def traced(trace: Callable) -> Iterator[None]:
    """Python's trace function for a while."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def calls(*functions: str) -> Iterator[list[str]]:
    """The calls of these functions, by their qualified names, in order."""
    found: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_qualname in functions:
            found.append(frame.f_code.co_qualname)

    with traced(trace):
        yield found


@contextmanager
def raising(function: str, error: BaseException, number: int = 1, event: str = "call") -> Iterator[None]:
    """The error in the n-th call of the function, by its qualified name; `event` is "call" or "return"."""
    left = number

    def trace(frame: FrameType, seen: str, _: object) -> Callable | None:
        nonlocal left
        if frame.f_code.co_qualname != function:
            return None
        left -= seen == event
        if left == 0 and seen == event:
            sys.settrace(None)
            raise error
        return trace

    with traced(trace):
        yield
    assert left <= 0, f"{function} was called {number - left} times"


class Moments:
    """The lines of `files` that a call runs through, by function; `stop_at` raises at one of them."""

    def __init__(self, files: tuple[str, ...], stop_at: int | None = None):
        self.files, self.stop_at = files, stop_at
        self.passed: list[CodeType] = []

    def __call__(self, frame: FrameType, event: str, _: object):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        if len(self.passed) == self.stop_at:
            sys.settrace(None)
            raise Interruption
        self.passed.append(frame.f_code)
        return self

    def run(self, *call) -> dict[CodeType, list[int]]:
        """Make the call; the moments of each function."""
        with traced(self):
            call[0](*call[1:])
        found = defaultdict(list)
        for number, code in enumerate(self.passed):
            found[code].append(number)
        return found


def interrupt_anywhere(images: Images, files: tuple[str, ...], before, request, closely: str, as_fresh) -> None:
    """Interrupt the request in some functions of the files, and four times near the end of those called `closely`."""
    choose = random.Random(0)

    def begin() -> None:
        images(*before)
        images.forget()

    begin()
    moments = Moments(files).run(images, *request)
    chosen = [choose.choice(found) for found in choose.sample(list(moments.values()), 6)]
    (close,) = (found for code, found in moments.items() if code.co_name == closely)
    for moment in (*chosen, *close[-8::2]):
        begin()
        with pytest.raises(Interruption):
            Moments(files, moment).run(images, *request)
        assert as_fresh(), moment

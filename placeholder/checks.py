"""Checks of single input values; each returns the value in its type or raises ValueError with what is accepted."""

import math
import reprlib
from typing import Any

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

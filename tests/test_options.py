"""Declared options: which values are accepted, the sentence on any other, and what --help and the docs take from them."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Annotated, Literal

import pytest

from placeholder.options import NUMERIC, Flag, Number, Text, Whole, checked, option, options_class, options_of, whole


@options_class
class Inputs:
    """An option of each kind."""

    steps: Annotated[Whole, option("first", "train", ge=1, le=5, resume_may_change=True)] = 3
    """Number of steps."""
    rate: Annotated[Number, option("first", ge=0.0, le=10.0)] = 1e-4
    """Rate."""
    size: Annotated[Literal[1, 2, 4], NUMERIC, option("second")] = 1
    """Size."""
    fast: Annotated[Flag, option("second")] = False
    """Fast."""
    caption: Annotated[Text, option("second")] = ""
    """Caption."""
    seed: Annotated[Whole | None, option("second", ge=0, le=9)] = None
    """Seed."""


@options_class
class Required:
    """A required option."""

    name: Annotated[Text, option("first")]
    """Name."""


def refusal(name: str, value) -> str:
    """The sentence by which a value is refused."""
    with pytest.raises(ValueError) as raised:
        checked(Inputs, {name: value})
    assert type(raised.value) is ValueError
    return str(raised.value)


@pytest.mark.parametrize(("given", "found"), [(1, 1.0), (0.5, 0.5), ("1e-5", 1e-5), (" 2 ", 2.0), (10, 10.0), (0, 0.0)])
def test_a_number_is_taken_as_it_is_or_as_text(given, found):
    assert checked(Inputs, {"rate": given}).rate == found


@pytest.mark.parametrize("given", [-0.1, 10.1, math.nan, math.inf, "nan", "ten", True, [1], {}, 10**400])
def test_a_number_outside_its_range_or_of_another_kind_is_refused(given):
    assert refusal("rate", given).startswith("rate is ")
    assert refusal("rate", given).endswith(": give a number from 0.0 to 10.0")


@pytest.mark.parametrize(("given", "found"), [(1, 1), (3.0, 3), ("3", 3), ("0.5e1", 5)])
def test_a_whole_number_comes_back_as_int(given, found):
    steps = checked(Inputs, {"steps": given}).steps
    assert steps == whole("steps", given, 1, 5) == found
    assert type(steps) is int


@pytest.mark.parametrize("given", [0, 6, 2.5, "2.5", True, math.nan, "9" * 5000])
def test_what_is_no_whole_number_in_range_is_refused(given):
    assert refusal("steps", given).endswith(": give a whole number from 1 to 5")
    with pytest.raises(ValueError, match="^steps is .*: give a whole number from 1 to 5$"):
        whole("steps", given, 1, 5)


@pytest.mark.parametrize("given", [0, 1, "true", "yes"])
def test_only_true_and_false_are_flags(given):
    assert checked(Inputs, {"fast": True}).fast is True
    assert refusal("fast", given).endswith(": give true or false")


@pytest.mark.parametrize("given", [3, "3", "one", True, [1], {}])
def test_a_choice_outside_the_list_is_refused_with_the_list(given):
    assert checked(Inputs, {"size": 2}).size == checked(Inputs, {"size": "2"}).size == 2
    assert refusal("size", given).endswith(": choose one of 1, 2, 4")


def test_text_is_limited_and_nothing_else_is_text():
    assert checked(Inputs, {"caption": "a" * 20_000}).caption == "a" * 20_000
    assert refusal("caption", "a" * 20_001) == "caption is 20001 characters long: give text of at most 20000 characters"
    assert refusal("caption", 5) == "caption is 5: give text of at most 20000 characters"
    assert refusal("caption", "a\ud800").startswith(r"caption is 'a\ud800': give text")


@pytest.mark.parametrize("blank", ["", " \n", None])
def test_what_is_left_blank_counts_as_not_given(blank):
    assert checked(Inputs, dict.fromkeys(options_of(Inputs), blank)) == Inputs()
    with pytest.raises(ValueError, match="^name is "):
        checked(Required, {"name": None})
    assert checked(Required, {"name": ""}).name == ""  # what a required input may be is said where it is used


def test_options_are_checked_when_they_are_made_and_when_they_are_replaced():
    assert replace(Inputs(), steps="4") == Inputs(steps=4)
    for wrong in ({"steps": 9}, {"stepz": 1}):
        with pytest.raises(ValueError):
            replace(Inputs(), **wrong)
    with pytest.raises(FrozenInstanceError):
        Inputs().steps = 2


def test_an_option_says_all_that_its_declaration_says():
    found = options_of(Inputs)["steps"]
    assert (found.kind, found.default, found.low, found.high, found.choices) == (int, 3, 1, 5, ())
    assert (found.description, found.heading, found.section) == ("Number of steps.", "first", "train")
    assert found.resume_may_change and not options_of(Inputs)["rate"].resume_may_change
    assert [option.kind for option in options_of(Inputs).values()] == [int, float, int, bool, str, int]
    assert options_of(Inputs)["size"].choices == (1, 2, 4)

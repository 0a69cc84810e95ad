"""Single values: numbers, whole numbers, flags, choices and text."""

import math

import pytest

from placeholder.errors import choice, flag, number, shown, text, whole


@pytest.mark.parametrize(("given", "found"), [(1, 1.0), (0.5, 0.5), ("1e-5", 1e-5), (" 2 ", 2.0), (10, 10.0), (0, 0.0)])
def test_a_number_is_taken_as_it_is_or_as_text(given, found):
    assert number("rate", given, 0, 10) == found


@pytest.mark.parametrize("given", [-0.1, 10.1, math.nan, math.inf, "nan", "ten", "", None, True, [1], {}, 10**400])
def test_a_number_outside_its_range_or_of_another_kind_is_refused(given):
    with pytest.raises(ValueError, match="^rate is .*: give a number from 0 to 10$"):
        number("rate", given, 0, 10)


def test_a_whole_number_comes_back_as_int():
    assert whole("steps", 3.0, 1, 5) == 3
    assert isinstance(whole("steps", "3", 1, 5), int)


@pytest.mark.parametrize("given", [0, 6, 2.5, "2.5", None, True, math.nan])
def test_what_is_no_whole_number_in_range_is_refused(given):
    with pytest.raises(ValueError, match="^steps is .*: give a whole number from 1 to 5$"):
        whole("steps", given, 1, 5)


@pytest.mark.parametrize("given", [0, 1, "true", None, "yes"])
def test_only_true_and_false_are_flags(given):
    assert flag("quantize", True) is True
    assert flag("quantize", False) is False
    with pytest.raises(ValueError, match="^quantize is .*: give true or false$"):
        flag("quantize", given)


@pytest.mark.parametrize("given", [3, "1", None, True, [1], {}])
def test_a_choice_outside_the_list_is_refused_with_the_list(given):
    assert choice("batch_size", 2, (1, 2, 4)) == 2
    with pytest.raises(ValueError, match="^batch_size is .*: choose one of 1, 2, 4$"):
        choice("batch_size", given, (1, 2, 4))


def test_text_is_limited_and_nothing_else_is_text():
    assert text("prompt", "a" * 20_000) == "a" * 20_000
    with pytest.raises(ValueError, match="^prompt is 20001 characters long: give text of at most 20000 characters$"):
        text("prompt", "a" * 20_001)
    with pytest.raises(ValueError, match="^prompt is 5: give text"):
        text("prompt", 5)


def test_a_huge_or_nested_value_is_shown_short():
    nested: list = []
    for _ in range(500):
        nested = [nested]
    assert len(shown("x" * 10_000)) < 100
    assert len(shown(nested)) < 100
    assert shown([10**5000]) == "[an integer of 16610 bits]"


def test_text_with_half_a_surrogate_pair_gets_its_sentence():
    with pytest.raises(ValueError, match=r"^prompt is 'a\\ud800': give text without halves of surrogate pairs"):
        text("prompt", "a\ud800")

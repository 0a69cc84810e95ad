"""How names and errors from strangers are shown."""

import pytest

from placeholder.errors import MAX_SHOWN, label, quoted, reason


@pytest.mark.parametrize("name", ["a.png", "folder/a b.png", "\u00e9.png", "\u5199\u771f.png"])
def test_a_plain_name_is_shown_as_it_is(name):
    assert label(name) == name
    assert quoted(name) == f"'{name}'"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\udcff", "\u202e", "x" * 5000, "\0" * 5000])
def test_any_other_name_is_quoted_escaped_and_cut(name):
    assert label(name) == quoted(name)
    assert quoted(name).isprintable()
    assert len(quoted(name)) <= MAX_SHOWN + 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [("two\n lines", "two lines"), ("\x1b[31mred", "?[31mred"), ("", "ValueError"), ("x" * 5000, f"{'x' * 200}...{'x' * 200}")],
)
def test_an_error_is_shown_on_one_short_line(text, shown):
    assert reason(ValueError(text)) == shown

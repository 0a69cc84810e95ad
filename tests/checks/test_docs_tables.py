"""The tables of inputs in the docs."""

import pytest

from checks.docs_tables import PAGES, table, with_table
from placeholder.service.parser import INPUTS


@pytest.mark.parametrize("command", PAGES)
def test_the_table_of_inputs_is_the_one_of_the_declared_options(command):
    page = PAGES[command].read_text(encoding="utf-8")
    assert with_table(page, "inputs", table(INPUTS[command])) == page, "run make docs"
    assert all(f"\n| `{name}` | " in page for name in INPUTS[command])

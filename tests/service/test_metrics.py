"""Figures for Cog: reported where it runs, and never a reason to fail."""

import sys
from types import SimpleNamespace

import pytest

from placeholder.service.metrics import record


@pytest.fixture
def told(monkeypatch) -> dict[str, float]:
    """What is recorded, in the place of Cog."""
    found: dict[str, float] = {}
    scope = SimpleNamespace(record_metric=found.__setitem__)
    monkeypatch.setitem(sys.modules, "cog", SimpleNamespace(current_scope=lambda: scope))
    return found


def test_a_figure_is_reported_by_its_name(told):
    record("training_step_count", 15)
    assert told == {"training_step_count": 15}


@pytest.mark.parametrize(
    "error", [RuntimeError("no scope"), TypeError("no number"), ValueError("no name"), AttributeError("old")]
)
def test_a_figure_that_is_refused_is_a_line_in_the_log(error, told, monkeypatch, capsys):
    def refuse():
        raise error

    monkeypatch.setattr(sys.modules["cog"], "current_scope", refuse)
    record("training_step_count", 15)
    assert capsys.readouterr().out == f"Warning: the metric training_step_count was not recorded ({error})\n"


def test_without_cog_nothing_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "cog", raising=False)
    record("training_step_count", 15)
    assert "cog" not in sys.modules

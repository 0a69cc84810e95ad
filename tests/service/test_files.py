"""Temporary folders of results."""

import pytest

from placeholder.service.files import OutputFolder


def test_a_result_stays_until_the_next_request_begins(temporary):
    output = OutputFolder("placeholder-")
    with output.fresh() as first:
        (first / "result").write_bytes(b"x")
    assert (first / "result").exists()
    with output.fresh() as second:
        assert not first.exists()
        assert list(second.iterdir()) == []
    assert [folder.name for folder in temporary.iterdir()] == [second.name]
    assert second.name.startswith("placeholder-")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_request_that_fails_or_is_stopped_leaves_nothing(error, temporary):
    output = OutputFolder("placeholder-")
    with output.fresh():
        pass
    with pytest.raises(error), output.fresh() as folder:
        (folder / "half").write_bytes(b"x")
        raise error
    assert list(temporary.iterdir()) == []

"""Temporary folders of results, and weights that come by URL."""

import tempfile
from pathlib import Path

import pytest

from placeholder.files import OutputFolder, local_file


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """The place of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


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


def test_a_path_is_taken_as_it_is_and_nothing_is_copied(temporary):
    with local_file("some/weights.zip") as path:
        assert path == Path("some/weights.zip")
    assert list(temporary.iterdir()) == []


def test_a_url_is_fetched_and_removed_afterwards(site, temporary):
    address, folder = site
    (folder / "weights.zip").write_bytes(b"content")
    with local_file(f"{address}/weights.zip?key=secret") as path:
        assert path.read_bytes() == b"content"
    assert not path.exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["/none.zip?key=secret", None])
def test_a_url_that_cannot_be_had_gets_its_sentence_without_its_query(name, site, temporary):
    address = site[0] + name if name else "http://127.0.0.1:9/weights.zip?key=secret"
    with (
        pytest.raises(ValueError, match="the weights could not be fetched from http.*: check the URL") as raised,
        local_file(address),
    ):
        pass
    assert "secret" not in str(raised.value)
    assert list(temporary.iterdir()) == []

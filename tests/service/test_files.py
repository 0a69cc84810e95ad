"""Temporary folders of results, and weights that come by URL."""

import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from placeholder.service.files import OutputFolder, local_file


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


class Redirect(BaseHTTPRequestHandler):
    """Sends everyone to where urllib does not go, and names a secret there."""

    def do_GET(self) -> None:
        """The redirection."""
        self.send_response(302)
        self.send_header("Location", "gopher://elsewhere/weights.zip?key=s3cr3t")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def redirecting():
    """The address of a server that redirects."""
    server = HTTPServer(("127.0.0.1", 0), Redirect)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.server_close()
    thread.join()


SECRETS = ("s3cr3t", "h1dden", "n0body")


def whole(error: BaseException) -> str:
    """All that a log would show of an error, with its causes."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/weights.zip?key=s3cr3t#h1dden",
        "http://n0body:s3cr3t@127.0.0.1:9/weights.zip",
        "http://n0body:s3cr3t@127.0.0.1:9/@home/weights.zip?key=h1dden",
        "http://n0body@127.0.0.1:9?key=s3cr3t",
        "http://127.0.0.1:9/a b?key=s3cr3t",
        "http://127.0.0.1:port/weights.zip",
        "http://[::1?key=s3cr3t",
        "https://127.0.0.1:9/weights.zip?key=s3cr3t",
    ],
)
def test_no_part_of_a_url_that_may_be_secret_is_shown(url, temporary):
    with (
        pytest.raises(ValueError, match="the weights could not be fetched from http.*: check the URL") as raised,
        local_file(url),
    ):
        pass
    assert not [word for word in SECRETS if word in whole(raised.value)]
    assert list(temporary.iterdir()) == []


def test_nor_is_the_address_of_a_redirection(redirecting):
    with pytest.raises(ValueError, match=r"HTTP status 302\): check the URL") as raised, local_file(redirecting):
        pass
    assert "s3cr3t" not in whole(raised.value)

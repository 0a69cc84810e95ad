"""Downloads: base models and files from a hub on this machine, weights by URL, and what the log and the errors say."""

import hashlib
import json
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from placeholder.model import download
from placeholder.model.base import BaseModel
from tests.support.serving import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"a": 1}',
    "transformer/weights.safetensors": bytes(3_000_000),
    "transformer/weights.bin": b"a pickle",
    "text_encoder/code.py": b"raise SystemExit",
    "README.md": b"words",
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to fetch a snapshot."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        """Only the headers."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Headers and content."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/some/model/tree"):
            content = json.dumps([{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0"} for name in FILES])
            content = content.encode()
        elif path.startswith("/api/models/some/model/revision/") and path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in FILES]
            content = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            name = path.split(f"/resolve/{COMMIT}/")[-1]
            content = FILES[name]
            self.asked.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "asked", [])
    with serving(Hub) as address:
        yield address


def test_only_weights_and_descriptions_are_fetched_and_the_log_tells_how_far(hub, tmp_path, capfd):
    log: list[str] = []
    download.fetch("some/model", log.append, hub, seconds=0.0)
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT
    found = {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    wanted = ("model_index.json", "transformer/config.json", "transformer/weights.safetensors")
    assert found == {name: FILES[name] for name in wanted}
    assert log[0] == "Base model: fetching what is missing of some/model"
    assert log[-2:] == ["Base model: 0.00 GB fetched", f"Base model: complete, commit {COMMIT}"]
    assert not any("%|" in line for line in log)  # which Replicate would take for the training's progress
    assert capfd.readouterr().err == ""


def test_a_folder_is_taken_as_it_is(base):
    log: list[str] = []
    BaseModel(base.source, base.device, base.dtype).fetch(log.append)
    assert log == []
    assert base.commit is None
    assert BaseModel("made of random weights", base.device, base.dtype).commit is None


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_the_commit_that_was_fetched_is_known_and_all_components_are_read_at_it(revision, hub, tmp_path):
    base = BaseModel("some/model", torch.device("cpu"), torch.float32, revision=revision)
    assert base.commit is None
    log: list[str] = []
    download.fetch("some/model", log.append, hub, revision)
    assert base.commit == COMMIT
    assert log[0] == "Base model: fetching what is missing of some/model" + (f" at {revision}" if revision else "")
    assert log[-1] == f"Base model: complete, commit {COMMIT}"
    asked = []

    class Component:
        """A component, and its configuration, that note what is asked of them."""

        @classmethod
        def from_pretrained(cls, source: str, **options: str) -> None:
            asked.append((source, options))

    Component.config_class = Component
    base.component(Component, "vae")
    base.configuration(Component, "text_encoder")
    assert asked == [("some/model", {"subfolder": name, "revision": COMMIT}) for name in ("vae", "text_encoder")]


def test_a_revision_that_is_not_there_gets_its_sentence(hub):
    with pytest.raises(ValueError, match="some/model has no revision 'v9': give one of its commits, tags or branches"):
        download.fetch("some/model", lambda line: None, hub, "v9")


def test_a_single_file_is_fetched_once_at_its_revision(hub, tmp_path):
    log: list[str] = []
    for _ in range(2):
        path = download.fetch_file("some/model", "transformer/weights.safetensors", COMMIT, log.append, hub)
        assert path.read_bytes() == FILES["transformer/weights.safetensors"]
        assert path.is_relative_to(tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT)
    assert Hub.asked.count("transformer/weights.safetensors") == 2  # the headers, then the content; nothing the second time
    assert log[0] == f"Fetching transformer/weights.safetensors of some/model at {COMMIT} unless it is cached"


def test_a_single_file_that_cannot_be_had_gets_its_sentence(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="x.safetensors of some/model at v1 could not be fetched"):
        download.fetch_file("some/model", "x.safetensors", "v1", lambda line: None, hub)


def test_a_path_is_taken_as_it_is_and_nothing_is_copied(temporary):
    with download.local_file("some/weights.zip") as path:
        assert path == Path("some/weights.zip")
    assert list(temporary.iterdir()) == []


def test_a_url_is_fetched_and_removed_afterwards(site, temporary):
    address, folder = site
    (folder / "weights.zip").write_bytes(b"content")
    with download.local_file(f"{address}/weights.zip?key=secret") as path:
        assert path.read_bytes() == b"content"
    assert not path.exists()
    assert list(temporary.iterdir()) == []


class Redirect(BaseHTTPRequestHandler):
    """Sends everyone to where urllib does not go, and names a secret there."""

    def do_GET(self) -> None:
        """The redirection."""
        self.send_response(302)
        self.send_header("Location", "gopher://elsewhere/weights.zip?key=s3cr3t")
        self.end_headers()


@pytest.fixture
def redirecting():
    """The address of a server that redirects."""
    with serving(Redirect) as address:
        yield f"{address}/"


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
        pytest.raises(ValueError, match="the file could not be fetched from http.*: check the URL") as raised,
        download.local_file(url),
    ):
        pass
    assert not [word for word in SECRETS if word in whole(raised.value)]
    assert list(temporary.iterdir()) == []


def test_nor_is_the_address_of_a_redirection(redirecting):
    with pytest.raises(ValueError, match=r"HTTP status 302\): check the URL") as raised, download.local_file(redirecting):
        pass
    assert "s3cr3t" not in whole(raised.value)

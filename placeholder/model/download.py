"""Downloads: a base model or a single file from the Hugging Face hub, with log lines about the progress, and weights by URL."""

import http.client
import io
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from placeholder.errors import Log, readable_errors, reason

# Weights as safetensors and what describes them; nothing that could hold code or a pickle.
PATTERNS = ["model_index.json"] + [
    f"{folder}/{kind}"
    for folder in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    for kind in ("*.json", "*.safetensors", "*.txt")
]
SECONDS = 10.0  # between two lines
TIMEOUT_SECONDS = 60
URL_SCHEMES = ("http://", "https://")


def split_revision(name: str) -> tuple[str, str | None]:
    """Source and revision of `owner/name@revision`; the revision of a folder, or of a name without one, is None.

    Raises ValueError for a folder that holds no base model, and for a name or a revision that the hub could not have.
    """
    if Path(name).is_dir():
        if not (Path(name) / PATTERNS[0]).is_file():
            raise ValueError(f"the base model {name!r} is a folder without {PATTERNS[0]}: give one that diffusers has saved")
        return name, None
    source, at, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or (at and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision)):
        raise ValueError(
            f"the base model {name!r} is not a folder and not owner/name or owner/name@revision: give a commit, a tag or a "
            "branch after the @"
        )
    return source, revision if at else None


def fetch(source: str, log: Log, endpoint: str | None = None, revision: str | None = None, seconds: float = SECONDS) -> None:
    """Download the base model's missing files into the hub's cache; nothing where `source` is a folder.

    A log line every `seconds`. Raises ValueError for an unknown revision, and what huggingface_hub raises for other failures.
    """
    if Path(source).is_dir():
        return
    log(f"Base model: fetching what is missing of {source}" + (f" at {revision}" if revision else ""))
    options = {"allow_patterns": PATTERNS, "endpoint": endpoint, "tqdm_class": _logged(log, seconds)}
    try:
        folder = snapshot_download(source, revision=revision, **options)
    except RevisionNotFoundError as error:
        raise ValueError(f"{source} has no revision {revision!r}: give one of its commits, tags or branches") from error
    log(f"Base model: complete, commit {Path(folder).name}")


def fetch_file(source: str, name: str, revision: str, log: Log, endpoint: str | None = None) -> Path:
    """A single file of the hub's repository `source`, downloaded unless it is cached. Raises ValueError for any failure."""
    log(f"Fetching {name} of {source} at {revision} unless it is cached")
    try:
        return Path(hf_hub_download(source, name, revision=revision, endpoint=endpoint, tqdm_class=_logged(log, SECONDS)))
    except (HTTPError, OSError, ValueError) as error:  # of the hub, of the connection or the disk, of the names
        raise ValueError(f"{name} of {source} at {revision} could not be fetched ({reason(error)})") from error


def cached_commit(source: str, revision: str | None) -> str | None:
    """The commit that the hub's cache holds for the revision; None for a folder, an invalid name, and an empty cache."""
    if Path(source).is_dir():
        return None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=PATTERNS, local_files_only=True)).name
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _logged(log: Log, seconds: float) -> type[tqdm]:
    """A progress bar class for huggingface_hub that writes plain lines to a log, one every `seconds` at most."""

    class Logged(tqdm):
        """Logs the bytes that are on disk; the hub's other bars stay silent."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"file": io.StringIO()})
            self.counts_bytes = kwargs.get("unit") == "B" and kwargs.get("desc", "").startswith("Reconstruct")
            self.next_line = time.monotonic() + seconds

        def update(self, n: float | None = 1) -> bool | None:
            """Count `n` more bytes, and log them if it is time."""
            changed = super().update(n)
            if self.counts_bytes and time.monotonic() >= self.next_line:
                self.next_line = time.monotonic() + seconds
                log(f"Base model: {self.n / 1e9:.2f} GB fetched")
            return changed

    return Logged


@contextmanager
def local_file(source: str) -> Iterator[Path]:
    """A local path for a path or an http(s) URL; a download is removed afterwards.

    Raises ValueError when the URL cannot be fetched, RuntimeError when the disk is full.
    """
    if not source.startswith(URL_SCHEMES):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="placeholder-download-") as folder:
        target = Path(folder) / "download"
        _download(source, target)
        yield target


def _download(url: str, target: Path) -> None:
    """Fetch the URL into a file; no message shows its query or a user's name and password, which may be secret."""
    shown = re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])
    try:
        with readable_errors(), urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Without a cause: what urllib says may quote the URL.
        raise ValueError(f"the file could not be fetched from {shown} ({_reason(error)}): check the URL") from None


def _reason(error: Exception) -> str:
    """What went wrong, in words that cannot hold a part of the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError) else error
    return getattr(cause, "strerror", None) or type(cause).__name__

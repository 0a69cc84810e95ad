"""Fetching a base model from the Hugging Face hub: its files side by side, with lines that tell how far it is."""

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from placeholder.errors import reason

Log = Callable[[str], None]
# Weights as safetensors and what describes them; nothing that could hold code or a pickle.
PATTERNS = ["model_index.json"] + [
    f"{folder}/{kind}"
    for folder in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    for kind in ("*.json", "*.safetensors", "*.txt")
]
SECONDS = 10.0  # between two lines


def split_revision(name: str) -> tuple[str, str | None]:
    """Source and revision of `owner/name@revision`; a folder, or a name without a revision, is a source alone.

    Raises ValueError for a revision that git could not have.
    """
    if "@" not in name or Path(name).is_dir():
        return name, None
    source, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision):
        raise ValueError(
            f"the base model {name!r} is not a folder and not owner/name@revision: give a commit, a tag or a branch behind the @"
        )
    return source, revision


def fetch(source: str, log: Log, endpoint: str | None = None, revision: str | None = None) -> None:
    """See that all files of the base model are in the hub's cache; nothing where `source` is a folder.

    Raises ValueError for a revision that is not there, and what huggingface_hub raises where the model cannot be had.
    """
    if Path(source).is_dir():
        return
    log(f"Base model: fetching what is missing of {source}" + (f" at {revision}" if revision else ""))
    options = {"allow_patterns": PATTERNS, "endpoint": endpoint, "tqdm_class": _logged(log)}
    try:
        folder = snapshot_download(source, revision=revision, **options)
    except RevisionNotFoundError as error:
        raise ValueError(f"{source} has no revision {revision!r}: give one of its commits, tags or branches") from error
    log(f"Base model: complete, commit {Path(folder).name}")


def fetch_file(source: str, name: str, revision: str, log: Log, endpoint: str | None = None) -> Path:
    """A single file of the hub's repository `source`, from the cache where it is there. Raises ValueError where it cannot be had."""
    log(f"Fetching {name} of {source} at {revision} unless it is there")
    try:
        return Path(hf_hub_download(source, name, revision=revision, endpoint=endpoint, tqdm_class=_logged(log)))
    except (HTTPError, OSError, ValueError) as error:  # of the hub, of the connection or the disk, of the names
        raise ValueError(f"{name} of {source} at {revision} could not be fetched ({reason(error)})") from error


def cached_commit(source: str, revision: str | None) -> str | None:
    """The commit that the hub's cache holds for the revision; None for a folder, a name that no hub has, and where it holds none."""
    if Path(source).is_dir():
        return None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=PATTERNS, local_files_only=True)).name
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _logged(log: Log) -> type[tqdm]:
    """A progress bar that writes plain lines to a log, at most one in SECONDS."""

    class Logged(tqdm):
        """The bar of the bytes on disk; the hub's other bars stay silent."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"file": io.StringIO()})
            self.counts_bytes = kwargs.get("unit") == "B" and kwargs.get("desc", "").startswith("Reconstruct")
            self.next_line = time.monotonic() + SECONDS

        def update(self, n: float | None = 1) -> bool | None:
            """Count `n` more bytes and tell of them where it is time."""
            changed = super().update(n)
            if self.counts_bytes and time.monotonic() >= self.next_line:
                self.next_line = time.monotonic() + SECONDS
                log(f"Base model: {self.n / 1e9:.2f} GB fetched")
            return changed

    return Logged

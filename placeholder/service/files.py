"""Files that come in by URL and files that go out: fetched and kept in temporary folders that do not outlive their use."""

import atexit
import http.client
import re
import secrets
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from placeholder.errors import readable_errors

TIMEOUT_SECONDS = 60
URL_SCHEMES = ("http://", "https://")


class OutputFolder:
    """A temporary folder for what a request hands back.

    The server reads a result after the function has returned, so a result stays until the next request begins or the process
    ends. A request that fails leaves nothing.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._folder: Path | None = None
        atexit.register(self._remove)

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """An empty folder, in the place of the previous request's."""
        self._remove()
        # Known before it exists, so that an interruption cannot fall between the two.
        self._folder = Path(tempfile.gettempdir()) / (self._prefix + secrets.token_hex(8))
        try:
            with readable_errors():
                self._folder.mkdir(mode=0o700)
            yield self._folder
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


@contextmanager
def local_file(source: str) -> Iterator[Path]:
    """A local path for a path or an http(s) URL; a download is removed afterwards. Raises ValueError when it cannot be had,
    RuntimeError when the disk is full."""
    if not source.startswith(URL_SCHEMES):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="placeholder-download-") as folder:
        target = Path(folder) / "weights"
        _download(source, target)
        yield target


def _download(url: str, target: Path) -> None:
    """Fetch the URL into a file; no message shows its query or a user's name and password, where secrets travel."""
    shown = re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])
    try:
        with readable_errors(), urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Without a cause: what urllib says may quote the URL.
        raise ValueError(f"the weights could not be fetched from {shown} ({_reason(error)}): check the URL") from None


def _reason(error: Exception) -> str:
    """What went wrong, in words that cannot hold a part of the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError) else error
    return getattr(cause, "strerror", None) or type(cause).__name__

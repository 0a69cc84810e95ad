"""Files that come in by URL and files that go out: fetched and kept in temporary folders that do not outlive their use."""

import atexit
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        self._folder = Path(tempfile.mkdtemp(prefix=self._prefix))
        try:
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
    """A local path for a path or an http(s) URL; a download is removed afterwards. Raises ValueError when it cannot be had."""
    if not source.startswith(URL_SCHEMES):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="placeholder-download-") as folder:
        target = Path(folder) / "weights"
        try:
            with urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
                shutil.copyfileobj(response, file)
        except (urllib.error.URLError, TimeoutError) as error:
            raise ValueError(
                f"the weights could not be fetched from {source.split('?')[0]} ({error}): check the URL"
            ) from error
        yield target

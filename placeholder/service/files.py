"""Temporary folders for the files that a request returns."""

import atexit
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from placeholder.errors import readable_errors


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

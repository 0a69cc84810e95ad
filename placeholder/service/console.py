"""The console of the command line: on a terminal the progress stays on one line, elsewhere each line is printed as it is."""

import os
import re
import shutil
from typing import TextIO

PROGRESS = re.compile(r" *\d+%\|.*\| (\d+)/(\d+) \[")  # a line of tqdm.format_meter
CLEAR_LINE = "\r\x1b[K"  # ECMA-48: to the first column, erase to the end


class Console:
    """A Log that writes its lines to a stream."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.in_place = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.progress = ""  # the line that is to be rewritten

    def __call__(self, line: str) -> None:
        if not self.in_place:
            self._write(line + "\n")
            return
        found = PROGRESS.match(line)
        if found is None:
            self._write(f"{CLEAR_LINE}{line}\n{self.progress}")
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # a longer one would wrap, and its first row would stay
        finished = found[1] == found[2]
        self.progress = "" if finished else line
        self._write(CLEAR_LINE + line + "\n" * finished)

    def end(self, line: str) -> None:
        """A last line, below the progress."""
        self._write("\n" * bool(self.progress) + line + "\n")
        self.progress = ""

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

"""Where the seconds of a training go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timing:
    """Seconds by the name of the part, in the order in which the parts first began to count."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens within to the part `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

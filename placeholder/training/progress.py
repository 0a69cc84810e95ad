"""Progress lines in the log, the loss curve, and where the seconds of a training go."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from placeholder.errors import Log
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.training.loop import Step

LINES = 100  # about so many progress lines in a training


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


class Point(NamedTuple):
    """One progress line: mean losses since the line before, and the mean norm of the token embeddings, or None."""

    step: int
    loss: float
    preservation: float | None
    row_norm: float | None


class Progress:
    """Observes the steps: about a hundred progress lines over `total` steps, kept as `curve`.

    `first` is the step that the training starts after, `earlier` the `state_dict` of the training that is resumed.
    """

    def __init__(self, total: int, tokens: PlaceholderTokens, log: Log, first: int = 0, earlier: dict[str, Any] | None = None):
        self.total, self.tokens, self.log, self.first = total, tokens, log, first
        self.interval = max(1, total // LINES)
        earlier = earlier or {"losses": [], "preservations": [], "loss": math.nan, "seconds": 0.0, "curve": []}
        self.losses, self.preservations = (
            [torch.tensor(value, device=tokens.rows.device) for value in earlier[name]] for name in ("losses", "preservations")
        )
        self.loss, self.earlier_seconds, self.own_seconds = earlier["loss"], earlier["seconds"], 0.0
        self.curve = [Point(*values) for values in earlier["curve"]]
        self.checkpointed: int | None = None

    def timed(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The steps, with the time that they take counted, and not what is done between them."""
        iterator = iter(steps)
        while True:
            start = time.monotonic()
            step = next(iterator, None)
            self.own_seconds += time.monotonic() - start
            if step is None:
                return
            yield step

    @property
    def seconds(self) -> float:
        """Seconds of all steps so far, those before a resume among them."""
        return self.earlier_seconds + self.own_seconds

    def step(self, step: Step) -> None:
        """Take a step in. Raises RuntimeError at a progress line when the loss is no longer finite."""
        if self.checkpointed is not None and step.checkpointed != self.checkpointed:
            self.log(
                f"Memory: step {step.number} ran out of memory and was repeated with {step.checkpointed} checkpointed blocks"
            )
        self.checkpointed = step.checkpointed
        self.losses.append(step.loss)
        if step.preservation is not None:
            self.preservations.append(step.preservation)
        if step.number == 1 or step.number % self.interval == 0 or step.number == self.total:
            self._line(step.number)

    def _line(self, number: int) -> None:
        start = time.monotonic()
        self.loss, preservation = _mean(self.losses), _mean(self.preservations)
        self.own_seconds += time.monotonic() - start  # in which a GPU ends the steps that were queued
        self.losses, self.preservations = [], []
        if not math.isfinite(self.loss + (preservation or 0.0)):
            raise RuntimeError(
                f"the loss became {self.loss} by step {number}: train again with a lower learning_rate or "
                "placeholder_learning_rate"
            )
        figures = f"loss={self.loss:.4f}"
        if preservation is not None:
            figures += f", preservation={preservation:.4f}"
        row_norm = self.tokens.rows.detach().norm(dim=1).mean().item() if self.tokens.ids else None
        if row_norm is not None:
            figures += f", row norm={row_norm:.3g}"
        self.curve.append(Point(number, self.loss, preservation, row_norm))
        self.log(tqdm.format_meter(number, self.total, self.own_seconds, ascii=" #", postfix=figures, initial=self.first))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to log and record the same figures; JSON can hold it."""
        losses, preservations = ([value.item() for value in values] for values in (self.losses, self.preservations))
        return {
            "losses": losses,
            "preservations": preservations,
            "loss": self.loss,
            "seconds": self.seconds,
            "curve": [list(point) for point in self.curve],
        }

    def figures(self) -> dict[str, Any]:
        """The last mean loss, the norms of the token embeddings and the time, for meta.json."""
        norms = {token: rows.norm(dim=1).tolist() for token, rows in self.tokens.embeddings().items()}
        return {"loss": self.loss, "placeholder_row_norms": norms, "training_seconds": round(self.seconds, 3)}


def _mean(values: list[Tensor]) -> float | None:
    return torch.stack(values).mean().item() if values else None

"""What the steps of a training come to: progress lines in the log, and the figures for meta.json."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.training.loop import Step
from placeholder.training.setup import Log

LINES = 100


class Point(NamedTuple):
    """What a progress line says: means since the line before, and the mean norm of the rows; None where there is none."""

    step: int
    loss: float
    preservation: float | None
    row_norm: float | None


class Record:
    """Losses and time of the steps so far, with about a hundred progress lines over `total` steps, kept as `curve`.

    `earlier` is what `facts` returned when the training was interrupted after step `first`.
    """

    def __init__(self, total: int, tokens: PlaceholderTokens, log: Log, first: int = 0, earlier: dict[str, Any] | None = None):
        self.total, self.tokens, self.log, self.first = total, tokens, log, first
        self.interval = max(1, total // LINES)
        earlier = earlier or {"losses": [], "preservations": [], "loss": math.nan, "seconds": 0.0, "curve": []}
        self.losses, self.preservations = (
            [torch.tensor(value, device=tokens.rows.device) for value in earlier[name]] for name in ("losses", "preservations")
        )
        self.loss, self.seconds_before = earlier["loss"], earlier["seconds"]
        self.curve = [Point(*values) for values in earlier["curve"]]
        self.start = time.monotonic()
        self.checkpointed: int | None = None

    def note(self, step: Step) -> None:
        """Take a step in. Raises RuntimeError at a progress line when the loss is no longer finite."""
        if self.checkpointed is not None and step.checkpointed != self.checkpointed:
            self.log(
                f"Memory: step {step.number} ran out of it and was made again with {step.checkpointed} blocks checkpointed"
            )
        self.checkpointed = step.checkpointed
        self.losses.append(step.loss)
        if step.preservation is not None:
            self.preservations.append(step.preservation)
        if step.number == 1 or step.number % self.interval == 0 or step.number == self.total:
            self._line(step.number)

    def _line(self, number: int) -> None:
        self.loss, preservation = _mean(self.losses), _mean(self.preservations)
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
        elapsed = time.monotonic() - self.start
        self.log(tqdm.format_meter(number, self.total, elapsed, ascii=" #", postfix=figures, initial=self.first))

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption among them."""
        return self.seconds_before + time.monotonic() - self.start

    def facts(self) -> dict[str, Any]:
        """All that a resumed training needs to give the same figures."""
        losses, preservations = ([value.item() for value in values] for values in (self.losses, self.preservations))
        return {
            "losses": losses,
            "preservations": preservations,
            "loss": self.loss,
            "seconds": self.seconds,
            "curve": [list(point) for point in self.curve],
        }

    def figures(self) -> dict[str, Any]:
        """The last mean loss, the rows' norms and the time."""
        norms = {token: rows.norm(dim=1).tolist() for token, rows in self.tokens.embeddings().items()}
        return {"loss": self.loss, "placeholder_row_norms": norms, "training_seconds": round(self.seconds, 3)}


def _mean(values: list[Tensor]) -> float | None:
    return torch.stack(values).mean().item() if values else None

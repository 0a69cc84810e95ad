"""Requests for the tests of predictions, and an ImageGenerator whose images are arrays."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from placeholder.generate import ImageGenerator
from placeholder.lora.distilled import FastLora
from placeholder.model.base import BaseModel
from placeholder.request import Request

PLAIN = Request(
    prompt="a garden at noon",
    steps=6,
    width=64,
    height=64,
    seed=7,
    output_format="png",
    token_gate=False,  # what diffusers does; tests/journeys/test_gate.py has the gate
)
NAMED = replace(PLAIN, prompt="a photo of <zwx>")


class Images:
    """An ImageGenerator; each call gives an image as uint8 (H, W, 3), and `log` holds the lines of the last one."""

    def __init__(self, base: BaseModel, fast: FastLora | None = None):
        self.log: list[str] = []
        self.generator = ImageGenerator(base, self.log.append, fast)

    def __call__(self, request: Request, weights: Path | None = None, extra: Path | None = None) -> np.ndarray:
        self.log.clear()
        return np.asarray(self.generator.generate(request, weights, extra))

    def forget(self) -> None:
        """Empty the caches of archives and of prompt embeddings."""
        self.generator.weights.archives.clear()
        self.generator.prompt_embeds.cache_clear()

    def warnings(self) -> list[str]:
        """The warnings of the last call."""
        return [line for line in self.log if line.startswith("Warning")]

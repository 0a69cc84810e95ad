"""The full-size model with seeded random weights, built in memory: training in both modes and one prediction on CUDA.

`make check-gpu` runs the package's own functions below loading and writes benchmarks/full_size.json with losses, step times
and peak memory. Nothing is downloaded, and nothing is said of quality: the weights are noise.
"""

import argparse
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from placeholder.config import TrainConfig
from placeholder.devices import free_memory, reset_peak
from placeholder.finetune import finetune
from placeholder.generate import ImageGenerator
from placeholder.job import Job
from placeholder.model.base import BaseModel
from placeholder.request import Request
from standin.small_base import VOCABULARY_ROWS, qwen_tokenizer, scheduler
from standin.subject import write_images

# config.json of Qwen/Qwen-Image, text_encoder. The defaults of the other classes are the full size.
FULL_TEXT_ENCODER = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
STD = 0.02
WARM_UP_STEPS = 5  # left out of the median
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
CARDS, CARD_STEPS = (24, 48, 80), 3  # gigabytes; steps of a training on each


@dataclass(frozen=True)
class RandomBase(BaseModel):
    """A base model that is built from its configuration on the device, with weights from N(0, 0.02^2), never zeros.

    `sizes` holds the constructors' arguments by component; a component's weights are seeded by its name.
    """

    sizes: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"text_encoder": {"text_config": FULL_TEXT_ENCODER}}, hash=False
    )

    def fetch(self, log: Callable[[str], None]) -> None:
        """Nothing is downloaded."""

    def component(self, kind: type, name: str, dtype: torch.dtype | None = None, **_: Any) -> Any:
        """The component, built rather than loaded; tokenizer and scheduler are the real ones."""
        if name == "tokenizer":
            return qwen_tokenizer()
        if name == "scheduler":
            return scheduler()
        arguments = self.sizes.get(name, {})
        with torch.device(self.device), local_torch_dtype(dtype):  # no fp32 copy of 20 billion parameters is ever made
            module = kind(kind.config_class(**arguments)) if name == "text_encoder" else kind(**arguments)
        return fill(module, name)

    def configuration(self, kind: type, name: str) -> Any:
        """What the component is built from."""
        arguments = self.sizes.get(name, {})
        return kind.config_class(**arguments) if name == "text_encoder" else arguments


@torch.no_grad()
def fill(module: nn.Module, name: str) -> nn.Module:
    """Seeded noise in every matrix, kernel and bias; norms keep the scales they are initialized with."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    for parameter_name, parameter in module.named_parameters():
        if parameter.ndim > 1 or parameter_name.endswith("bias"):
            parameter.normal_(0.0, STD, generator=generator)
    return module


def write_dataset(path: Path, side: int) -> Path:
    """Four pictures of noise with captions that name <zwx>."""
    noise = [np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8) for number in range(4)]
    captions = [f"a photo of <zwx> number {number} in a garden at noon" for number in range(4)]
    return write_images(path, list(zip(map(Image.fromarray, noise), captions, strict=True)))


class StepClock:
    """A log that prints, and notes the time of every progress line; the loss in the line has been waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        if "%|" in line:
            self.times.append(time.monotonic())

    def step_seconds(self) -> list[float]:
        """Seconds from each line to the next, the warm-up left out."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)][WARM_UP_STEPS:]


def train(base: BaseModel, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """One training, with its losses, step time and peak memory; the archive stays in the folder."""
    clock = StepClock()
    free_memory()
    reset_peak()
    dataset = write_dataset(folder / "data.zip", config.resolution[0])
    meta = finetune(Job(dataset, config, folder / f"{config.training_mode}.zip"), base, clock)
    seconds = clock.step_seconds()
    return {
        **{name: meta[name] for name in ("loss", "expected_peak_gb", "peak_gb")},
        "median_step_seconds": statistics.median(seconds) if seconds else None,
        "peak_reserved_gb": _peak_gb(),
    }


GATES = {  # the second less the first is what the token gate's switching takes; the third has no LoRA in half of the passes
    "off": {"token_gate": False, "negative_prompt": "a <zwx>"},
    "on, both prompts named": {"negative_prompt": "a <zwx>"},
    "on": {},
}


def draw(base: BaseModel, archive: Path, side: int, steps: int) -> dict[str, Any]:
    """Images with an archive: seconds of a step with the token gate off, on in both passes, and on in one."""
    clock = StepClock()
    free_memory()
    reset_peak()
    generator = ImageGenerator(base, clock)
    request = Request(prompt="a photo of <zwx>", steps=steps, width=side, height=side, seed=0)
    found: dict[str, list[float]] = {name: [] for name in GATES}
    for _ in range(2):
        for name, options in GATES.items():
            clock.times.clear()
            image = generator.generate(replace(request, **options), archive)
            found[name] += clock.step_seconds()
    return {
        "size": image.size,
        "median_step_seconds": {name: statistics.median(seconds) if seconds else None for name, seconds in found.items()},
        "peak_reserved_gb": _peak_gb(),
    }


def on_card(base: BaseModel, side: int, steps: int, gigabytes: int) -> list[dict[str, Any]]:
    """Short trainings in the memory of a smaller card, in gigabytes: what was planned and what was used, or the refusal."""
    found = []
    for token, quantize in product((True, False), (False, True)):
        options = TOKEN if token else {}
        config = TrainConfig(steps=steps, resolution=(side,), seed=0, quantize=quantize, report=False, **options)
        found.append({"token": token, "quantize": quantize} | _trained_on_card(base, config, gigabytes))
        print(gigabytes, found[-1], flush=True)
    return found


@dataclass(frozen=True)
class CardBase(RandomBase):
    """The random base model on a card of so many gigabytes, on which nobody else is.

    The first to ask for the free memory is the memory plan. The second asks once all is loaded: random weights are made in bf16
    on the GPU, unlike loaded ones, so the card's limit holds and the peak counts from there on.
    """

    gigabytes: int = field(default=80, kw_only=True)
    asked: list[int] = field(default_factory=list, hash=False, kw_only=True)

    def free_bytes(self) -> int:
        """What is free on the card."""
        self.asked.append(round(self.gigabytes * 1e9))
        if self.device.type != "cuda":
            return self.asked[-1]
        if len(self.asked) == 2:
            free_memory()
            reset_peak()
            torch.cuda.set_per_process_memory_fraction(self.gigabytes * 1e9 / torch.cuda.mem_get_info()[1])
        return self.asked[-1] - torch.cuda.memory_allocated()


def _trained_on_card(base: BaseModel, config: TrainConfig, gigabytes: int) -> dict[str, Any]:
    card, log = CardBase(**vars(base), gigabytes=gigabytes), []
    free_memory()
    try:
        with tempfile.TemporaryDirectory() as name:
            dataset = write_dataset(Path(name) / "data.zip", config.resolution[0])
            meta = finetune(Job(dataset, config, Path(name) / "weights.zip"), card, log.append)
    except ValueError as error:
        return {"refused": str(error)}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error)}
    finally:
        if base.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    kept = {key: meta[key] for key in ("transformer_storage", "modulations_tabled", "expected_peak_gb", "peak_gb")}
    return kept | {"warnings": [line for line in log if line.startswith("Warning:")]}


def run(
    base: BaseModel, side: int, training_steps: int, drawing_steps: int, cards: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Train in both modes, draw once with the zero-prior archive, and train in the memory of smaller cards.

    Yields what is known after each of them, so that a run that is cut short leaves what it has measured.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {"side": side, "training_steps": training_steps, "drawing_steps": drawing_steps, "rank": TrainConfig.rank}
    found = {"device": device, "torch": torch.__version__, **settings}
    common = {"steps": training_steps, "resolution": (side,), "seed": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "zero_prior": lambda: train(base, TrainConfig(**common, **TOKEN), folder),
            "prediction": lambda: draw(base, folder / "zero_prior.zip", side, drawing_steps),
            "baseline": lambda: train(base, TrainConfig(**common), folder),
            **{f"card of {size} GB": partial(on_card, base, side, CARD_STEPS, size) for size in cards},
            "baseline, compiled": lambda: train(base, TrainConfig(**common, torch_compile=True), folder),
        }
        for part, measure in parts.items():
            found[part] = measure()
            yield found


def _peak_gb() -> float | None:
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None


def main() -> None:
    """Run at full size on the GPU and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--training-steps", type=int, default=20)
    parser.add_argument("--drawing-steps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("full_size.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found: the full-size model does not fit anything else")
    base = RandomBase("Qwen-Image with random weights", torch.device("cuda"), torch.bfloat16)
    for found in run(base, arguments.side, arguments.training_steps, arguments.drawing_steps, CARDS):
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

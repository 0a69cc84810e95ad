"""What it costs a running predictor to switch between archives, beside a cold start, on the small base model.

`make bench` writes benchmarks/switching.json. Two archives are trained for two steps each first; their quality does not matter.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from demo.small_base import build_small_base
from demo.subject import named, write_dataset
from demo.world import TRIGGER
from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.generate import ImageGenerator
from placeholder.models import BaseModel

ROUNDS = 10
TOKEN = "<zwx>"
SHORT = TrainConfig(steps=2, rank=16, resolution=(64,), learning_rate=1e-2, seed=0, report=False)


def silent(line: str) -> None:
    """Log nothing."""


def seconds(work: Callable[..., object], *args: object) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def trained_archives(base: BaseModel, folder: Path) -> list[Path]:
    """One archive with a token and one without."""
    archives = []
    for name, word, config in (
        ("token", TOKEN, TrainConfig(**vars(SHORT) | {"train_placeholder_token": True, "placeholder_token": (TOKEN,)})),
        ("baseline", TRIGGER, SHORT),
    ):
        archives.append(folder / f"{name}.zip")
        finetune(write_dataset(folder / f"{name}-data.zip", named(word)), config, archives[-1], base, silent)
    return archives


def measure(base: BaseModel, archives: list[Path]) -> dict[str, float]:
    """Seconds of a cold start with an archive; medians of a first use, of switching back and forth, of the same archive again."""
    one, other = archives
    started: list[ImageGenerator] = []

    def cold_start() -> None:
        started.append(ImageGenerator(base, silent))
        started[0].load(one)

    cold = seconds(cold_start)
    generator = started[0]
    first = seconds(generator.load, other)
    switches = [seconds(generator.load, archive) for _ in range(ROUNDS) for archive in archives]
    again = [seconds(generator.load, other) for _ in range(ROUNDS)]
    return {
        "cold_start_s": cold,
        "first_use_s": first,
        "switch_s": statistics.median(switches),
        "same_again_s": statistics.median(again),
    }


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(base, trained_archives(base, Path(folder)))
    found["switch_share"] = found["switch_s"] / found["cold_start_s"]
    (Path(__file__).parent / "switching.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""A thousand predictions in one process on the small base model: whether memory, open files and temporary folders stay flat.

`make soak` writes checks/soak.json and fails where they do not. Archives, prompts, sizes, formats and go_fast change all
the time, and every seventh request fails or is interrupted.
"""

import gc
import json
import os
import platform
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load, save

from benchmarks.switching import TOKEN, trained_archives
from placeholder.model.base import MODEL_VARIABLE, BaseModel
from placeholder.service.cli import inputs_of
from placeholder.weights.archive import LORA_NAME, embedding_name
from predict import Predictor
from standin.small_base import build_small_base
from tests.support.samples import read_zip, write_zip

REQUESTS, EVERY = 1000, 10
WARM = 50  # requests after which all caches are full
GROWTH = 0.02  # of the memory after WARM requests
MEGABYTE = 2**20
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "black", "white", "pink", "orange")
PLACES = ("in a garden", "on the beach", "at night", "under a tree", "on a table", "in the snow", "in the rain")


class Interruption(BaseException):
    """What ends a cancelled prediction."""


def archive_pool(base: BaseModel, folder: Path) -> list[Path]:
    """Six archives, more than the generator keeps: two that were trained, three with other rows, and a LoRA alone."""
    pool = trained_archives(base, folder)
    entries, row = read_zip(pool[0]), embedding_name(TOKEN)
    for factor in (2.0, -1.0, 3.0):
        rows = {name: factor * value for name, value in load(entries[row]).items()}
        pool.append(write_zip(folder / f"{factor}.zip", entries | {row: save(rows)}))
    pool.append(folder / "lora.safetensors")
    pool[-1].write_bytes(entries[LORA_NAME])
    return pool


def request(number: int, choose: random.Random, pool: list[Path]) -> dict[str, Any]:
    """Inputs of the n-th request; no two have the same prompt."""
    width, height = choose.choice([(64, 64), (96, 64), (64, 96)])
    return {
        "prompt": f"a {choose.choice(COLORS)} {TOKEN} {choose.choice(PLACES)}, number {number}",
        "steps": choose.randint(2, 4),
        "width": width,
        "height": height,
        "seed": number,
        "lora_scale": choose.choice([0.5, 1.0]),
        "replicate_weights": choose.choice([None, *pool]),
        "go_fast": choose.random() < 0.5,
        "output_format": choose.choice(["webp", "jpg", "png"]),
    }


def spoiled(number: int, inputs: dict[str, Any], bad: Path) -> dict[str, Any]:
    """The request made to fail, in one of three ways, or named for an interruption."""
    return (
        inputs | [{"prompt": " "}, {"replicate_weights": bad}, {"width": 63}, {"prompt": f"interrupted {number}"}][number % 4]
    )


class Interrupting:
    """A log that nobody reads, and that interrupts a prediction whose prompt says so in its second step."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, line: str) -> None:
        """Take a line."""
        if self.armed and " 2/" in line:
            raise Interruption


def predict(predictor: Predictor, inputs: dict[str, Any]) -> str:
    """What became of a request: the image's format, or the error's kind."""
    predictor.generator.log.armed = inputs["prompt"].startswith("interrupted")
    inputs = inputs_of("predict", inputs | {"replicate_weights": str(inputs["replicate_weights"] or "")})
    try:
        return Path(predictor.predict(**inputs)).suffix
    except (ValueError, Interruption) as error:
        return type(error).__name__


def sample(requests: int, temporary: Path) -> dict[str, float]:
    """Memory in megabytes, open files and temporary folders of this process now."""
    gc.collect()
    process = psutil.Process()
    return {
        "requests": requests,
        "rss_mb": round(process.memory_info().rss / MEGABYTE, 2),
        "open_files": process.num_fds(),
        "temporary": len(list(temporary.iterdir())),
    }


def verdict(samples: list[dict[str, float]], outcomes: dict[str, int]) -> list[str]:
    """What grew, and what failed that should not have."""
    warm = [found for found in samples if found["requests"] >= WARM]
    first, last = warm[0], warm[-1]
    grown = []
    images, right = sum(count for outcome, count in outcomes.items() if outcome[0] == "."), REQUESTS - REQUESTS // 7
    if images != right:
        grown.append(f"images: {images} of {right}")
    if abs(last["rss_mb"] - first["rss_mb"]) > GROWTH * first["rss_mb"]:
        grown.append(f"memory: {first['rss_mb']} MB after {first['requests']} requests, {last['rss_mb']} MB at the end")
    if len(counts := {found["open_files"] for found in warm}) > 1:
        grown.append(f"open files: from {min(counts)} to {max(counts)}")
    if (folders := max(found["temporary"] for found in warm)) > 1:
        grown.append(f"temporary folders: {folders}, where there is one for the latest image")
    return grown


def soak(base: BaseModel, folder: Path) -> dict[str, Any]:
    """All requests, one after the other."""
    temporary, choose = folder / "temporary", random.Random(0)
    temporary.mkdir()
    pool, bad = archive_pool(base, folder), folder / "bad.zip"
    bad.write_bytes(b"no archive")
    tempfile.tempdir = str(temporary)
    predictor = Predictor()
    predictor.setup()
    predictor.generator.log = Interrupting()
    samples, outcomes, start = [sample(0, temporary)], {}, time.perf_counter()
    for number in range(1, REQUESTS + 1):
        inputs = request(number, choose, pool)
        outcome = predict(predictor, spoiled(number // 7, inputs, bad) if number % 7 == 0 else inputs)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if number % EVERY == 0:
            samples.append(sample(number, temporary))
            print(samples[-1], flush=True)
    return {"seconds": round(time.perf_counter() - start, 1), "outcomes": outcomes, "samples": samples}


def main() -> None:
    """Run, write the result, and fail where something grew."""
    torch.set_num_threads(1)
    os.environ[MODEL_VARIABLE] = str(build_small_base())
    with tempfile.TemporaryDirectory() as folder:
        found = soak(BaseModel.from_environment(), Path(folder))
    tempfile.tempdir = None
    record = {
        "machine": f"one thread of {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
        "grown": verdict(found["samples"], found["outcomes"]),
        **found,
    }
    (Path(__file__).parent / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit("; ".join(record["grown"]) or None)


if __name__ == "__main__":
    main()

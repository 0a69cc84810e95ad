"""The cost of switching archives in a running predictor, beside a cold start, on the small base model.

`make bench` writes benchmarks/switching.json. Two archives are trained for two steps each first; their quality does not matter.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.generate import ImageGenerator
from placeholder.job import Job
from placeholder.lora.adapter import ADAPTER, load_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_tokenizer, load_transformer
from placeholder.training.losses import Denoiser
from placeholder.transformer.layers import fuse_lora_addition
from placeholder.weights.archive import read_weights
from standin.small_base import build_small_base
from standin.world import TRIGGER
from study.subjects import SUBJECTS

ROUNDS, PASSES = 10, 9
GRID, PROMPT = (16, 16), 32  # of a pass: tokens of the picture, and of the prompt
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
        dataset = SUBJECTS["object"].write_dataset(folder / f"{name}-data.zip", word)
        finetune(Job(dataset, config, archives[-1]), base, silent)
    return archives


def measure(base: BaseModel, archives: list[Path]) -> dict[str, float]:
    """Seconds of a cold start; medians of a first use, of switching back and forth, of the same archive again."""
    one, other = archives
    started: list[ImageGenerator] = []

    def cold_start() -> None:
        started.append(ImageGenerator(base, silent))
        started[0].load(one)

    load_tokenizer.cache_clear()  # the trainings have loaded it
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


def passes(base: BaseModel, archive: Path) -> dict[str, float]:
    """Medians of a forward pass without a LoRA, with one as PEFT adds it, as predictions add it, and merged; the merge's time.

    In turns. `left_by_merging` is the largest difference of a prediction after the LoRA was merged and taken out again.
    """
    transformer = load_transformer(base)
    lora = read_weights(archive).lora
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(1, GRID[0] * GRID[1], transformer.config.in_channels, generator=generator),
        torch.full((1,), 0.5),
        torch.randn(1, PROMPT, transformer.config.joint_attention_dim, generator=generator),
        GRID,
    )

    @torch.no_grad()
    def timed() -> float:
        return statistics.median(seconds(Denoiser(transformer), *inputs) for _ in range(PASSES))

    with torch.no_grad():
        before = Denoiser(transformer)(*inputs)
    found: dict[str, list[float]] = {
        "pass_s": [],
        "pass_peft_s": [],
        "pass_by_product_s": [],
        "pass_merged_s": [],
        "merge_s": [],
    }
    for _ in range(ROUNDS):
        found["pass_s"].append(timed())
        load_lora(transformer, lora)
        found["pass_peft_s"].append(timed())
        found["merge_s"].append(seconds(transformer.fuse_lora))
        found["pass_merged_s"].append(timed())
        transformer.unfuse_lora()
        fuse_lora_addition(transformer, ADAPTER)
        found["pass_by_product_s"].append(timed())
        transformer.unload_lora()
    with torch.no_grad():
        left = (Denoiser(transformer)(*inputs) - before).abs().max().item()
    return {name: statistics.median(values) for name, values in found.items()} | {"left_by_merging": left}


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        archives = trained_archives(base, Path(folder))
        found = measure(base, archives) | passes(base, archives[1])
    found["switch_share"] = found["switch_s"] / found["cold_start_s"]
    (Path(__file__).parent / "switching.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

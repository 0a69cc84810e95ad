"""CUDA graphs on a GPU: whether trainings give the same weights with them, and what each graph of a full-size step takes.

Part of `make check-gpu`; writes checks/cuda_graphs.json. The model is as in benchmarks/full_size.py, with random weights.
"""

import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.full_size import FULL_TEXT_ENCODER, RandomBase, write_dataset
from placeholder.config import TrainConfig
from placeholder.devices import free_memory
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.lora.adapter import add_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_transformer
from placeholder.training import loop
from placeholder.training.losses import Denoiser, flow_matching_losses
from placeholder.transformer import graphs
from placeholder.weights.archive import read_weights

RESULTS = Path(__file__).with_suffix(".json")
FEW_LAYERS = {  # at full width
    "text_encoder": {"text_config": FULL_TEXT_ENCODER | {"num_hidden_layers": 2}},
    "transformer": {"num_layers": 4},
}
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",), "prior_preservation": 1.0}
TRAININGS: dict[str, dict[str, Any]] = {
    "token": TOKEN,
    "token, int8": TOKEN | {"quantize": True},
    "batch 2": {"batch_size": 2},
    "prodigy": {"optimizer": "prodigy"},
    "blocks compiled": {"torch_compile": True},
}
STEPS, SIDE, LENGTHS = 12, 512, (32, 40, 48)


def trained(base: BaseModel, config: TrainConfig, log: list[str]) -> dict[str, Tensor]:
    """The weights and embeddings of a training."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "weights.zip"
        finetune(Job(write_dataset(Path(folder) / "data.zip", config.resolution[0]), config, output), base, log.append)
        weights = read_weights(output)
    return weights.lora | weights.embeddings


def same_weights(base: BaseModel, config: TrainConfig) -> bool:
    """Whether a deterministic training gives the same weights bit for bit with CUDA graphs and without."""
    log, replays, replay = [], [], graphs.CapturedPass.replay
    with patch.object(graphs.CapturedPass, "replay", lambda *arguments: replays.append(1) or replay(*arguments)):
        one = trained(base, config, log)
    with patch.object(graphs, "DEVICE", "none"):
        other = trained(base, config, log)
    failed = any("CUDA graphs" in line or "could not be compiled" in line for line in log)
    return bool(replays) and not failed and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def goes_on_without(base: BaseModel, config: TrainConfig) -> bool:
    """Whether a training whose steps cannot be captured, because they wait for the GPU, says so and gives the same weights."""
    original, log = loop.flow_matching_losses, []

    def waiting(*arguments: Any) -> Tensor:
        losses = original(*arguments)
        losses.sum().item()
        return losses

    with patch.object(loop, "flow_matching_losses", waiting):
        one = trained(base, config, log)
    free_memory()
    torch.rand(1, device="cuda")  # the allocator and PyTorch's random numbers go on
    other = trained(base, config, [])
    warned = sum("CUDA graphs" in line for line in log) == 1
    return warned and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def footprints(base: BaseModel) -> list[dict[str, Any]]:
    """Steps of the full-size transformer at several prompt lengths: seconds, the allocator's bytes, and bytes beside it."""
    transformer = load_transformer(base)
    add_lora(transformer, 32, seed=0)
    passes, denoiser = graphs.Passes(base.device, transformer, print), Denoiser(transformer)
    found, grid = [], (SIDE // 16, SIDE // 16)
    for length in LENGTHS:
        latents = torch.randn(1, math.prod(grid), 64, device=base.device)
        embeds = torch.randn(1, length, 3584, device=base.device, dtype=base.dtype)
        sigma = torch.full((1,), 0.5, device=base.device)
        for what in ("first", "captured", "replayed"):
            torch.cuda.synchronize()
            start = time.monotonic()
            passes.zero_grad()
            passes.run(flow_matching_losses, (denoiser, grid), (latents, latents.flip(0), sigma, sigma, embeds, None), 1.0)
            torch.cuda.synchronize()
            if passes.holds_memory != (what != "first" or length != LENGTHS[0]):
                raise SystemExit(f"the {what} step of {length} tokens was not as planned")
            free, total = torch.cuda.mem_get_info()
            seconds, reserved = time.monotonic() - start, torch.cuda.memory_reserved()
            memory = {"reserved_gb": reserved / 1e9, "beside_gb": (total - free - reserved) / 1e9}
            found.append({"length": length, "step": what, "seconds": seconds} | memory)
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Run all on the GPU and write the results; fails where weights differ."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found")
    base = RandomBase("a few layers", torch.device("cuda"), torch.bfloat16, sizes=FEW_LAYERS)
    config = TrainConfig(steps=STEPS, resolution=(SIDE,), seed=0, deterministic=True, report=False)
    same = {}
    for name, options in TRAININGS.items():
        same[name] = same_weights(base, replace(config, **options))
        print(name, same[name], flush=True)
    steps = footprints(RandomBase("full size", base.device, base.dtype))
    same["not captured"] = goes_on_without(base, replace(config, **TOKEN))
    print(same, flush=True)
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "same weights": same, "a step at 512": steps}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if not all(same.values()):
        raise SystemExit("weights differ")


if __name__ == "__main__":
    main()

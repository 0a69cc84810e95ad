"""CUDA graphs on a GPU: whether trainings give the same weights with them, and what each graph of a full-size step takes.

Part of `make check-gpu`; writes checks/cuda_graphs.json. The model is as in benchmarks/full_size.py, with random weights.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.full_size import FULL_TEXT_ENCODER, RandomBase, write_dataset
from placeholder.config import TrainConfig
from placeholder.devices import deterministic, free_memory
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
    """Whether a training whose steps cannot be captured, because they wait for the GPU, says so and gives the same weights.

    And whether its memory is given back afterwards.
    """
    original, log = loop.flow_matching_losses, []

    def waiting(*arguments: Any) -> Tensor:
        losses = original(*arguments)
        losses.sum().item()
        return losses

    with patch.object(loop, "flow_matching_losses", waiting):
        one = trained(base, config, log)
    free_memory()
    kept = torch.cuda.memory_reserved()
    torch.rand(1, device="cuda")  # the allocator and PyTorch's random numbers go on
    other = trained(base, config, [])
    warned = sum("CUDA graphs" in line for line in log) == 1
    return warned and kept < 10**9 and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def prepared(base: BaseModel, side: int) -> tuple[nn.Module, Callable[[graphs.Passes, int], list[Tensor]]]:
    """A transformer with a LoRA, and a step of it for a prompt length, which returns copies of some of the LoRA's gradients."""
    transformer, grid = load_transformer(base), (side // 16, side // 16)
    lora, denoiser = add_lora(transformer, 32, seed=0), Denoiser(transformer)

    def step(passes: graphs.Passes, length: int) -> list[Tensor]:
        generator = torch.Generator(base.device).manual_seed(length)
        latents = torch.randn(1, math.prod(grid), 64, device=base.device, generator=generator)
        embeds = torch.randn(1, length, 3584, device=base.device, dtype=base.dtype, generator=generator)
        sigma = torch.full((1,), 0.5, device=base.device)
        passes.zero_grad()
        passes.run(flow_matching_losses, (denoiser, grid), (latents, latents.flip(0), sigma, sigma, embeds, None), 1.0)
        return [parameter.grad.clone() for parameter in lora[:16] if parameter.grad is not None]

    return transformer, step


def footprints(base: BaseModel) -> list[dict[str, Any]]:
    """Steps of the full-size transformer at several prompt lengths: seconds, the allocator's bytes, and bytes beside it."""
    transformer, step = prepared(base, SIDE)
    passes, found = graphs.Passes(base.device, transformer, print), []
    for length in LENGTHS:
        for what in ("first", "captured", "replayed"):
            torch.cuda.synchronize()
            start = time.monotonic()
            step(passes, length)
            torch.cuda.synchronize()
            if passes.holds_memory != (what != "first" or length != LENGTHS[0]):
                raise SystemExit(f"the {what} step of {length} tokens was not as planned")
            free, total = torch.cuda.mem_get_info()
            seconds, reserved = time.monotonic() - start, torch.cuda.memory_reserved()
            memory = {"reserved_gb": reserved / 1e9, "beside_gb": (total - free - reserved) / 1e9}
            found.append({"length": length, "step": what, "seconds": seconds} | memory)
            print(found[-1], flush=True)
    return found


def shares_memory(base: BaseModel) -> bool:
    """Whether passes without memory beside the graphs run in the memory of those, and all give the same gradients."""
    transformer, step = prepared(base, 2 * SIDE)
    eager, passes = graphs.Passes(torch.device("cpu"), transformer, print), graphs.Passes(base.device, transformer, print)
    other, *_, one = LENGTHS  # the graphs are those of the longer prompt, whose memory the shorter one fits into
    with deterministic(base.device, True):
        expected = {length: step(eager, length) for length in (one, other)}
        found = [(one, step(passes, one)) for _ in range(2)]
        free_memory()
        limit = torch.cuda.memory_reserved() + 3 * 10**8  # a pass of four layers takes 1.4 GB by the plan
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        try:
            step(passes, other)
            raise SystemExit("there was memory for a pass beside the graphs: the check shows nothing")
        except torch.OutOfMemoryError:
            passes.give_way()
        free_memory()
        for length in (other, one, other, one, other):  # in the pool, replayed, captured, replayed, replayed
            found.append((length, step(passes, length)))
        torch.cuda.set_per_process_memory_fraction(1.0)
    return all(torch.equal(*pair) for length, given in found for pair in zip(given, expected[length], strict=True))


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
    free_memory()
    same["in the memory of the graphs"] = shares_memory(base)
    same["not captured"] = goes_on_without(base, replace(config, **TOKEN))
    print(same, flush=True)
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "same weights": same, "a step at 512": steps}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if not all(same.values()):
        raise SystemExit("weights differ")


if __name__ == "__main__":
    main()

"""The training step of the full-size transformer on a CUDA GPU: our loop beside that of diffusers' script.

`make bench-gpu` builds the transformer with seeded random weights, since nothing has to be downloaded for a timing, and times
the loops in turns for several resolutions and prompt lengths, ours with compiled blocks after them. It writes
benchmarks/gpu.json and tables of docs/hardware.md with medians, interquartile ranges, peak memory, the share of the GPU's
arithmetic (MFU), what the GPU's time goes to, the kernels of a step, and how often it waits for the GPU.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.full_size import RandomBase
from benchmarks.scale import step_flops
from benchmarks.step import Inputs, Script
from checks.docs_tables import DOCS, write_table
from placeholder.config import TrainConfig
from placeholder.devices import free_memory, peak_bytes, reset_peak
from placeholder.distributed import SINGLE_PROCESS
from placeholder.lora.adapter import add_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_transformer
from placeholder.model.vae import pack
from placeholder.training.examples import BatchSampler, Example
from placeholder.training.loop import Schedule, TrainState, train_steps
from placeholder.training.losses import Denoiser
from placeholder.training.optimizers import lora_optimizer
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.compile import compiled_blocks
from placeholder.transformer.graphs import Passes
from placeholder.transformer.layers import CAST

CPU = torch.device("cpu")  # passes of a CPU are never captured
SIDES, TEXT_TOKENS, RANK, RATE = (512, 768, 1024), (32, 128, 256), 32, 1e-4
WARM_UP, TIMED = 10, 30
EAGER, OURS, COMPILED = "ours, without CUDA graphs", "ours", "ours, compiled"
PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200, by their maker's data sheet


@dataclass(frozen=True)
class Arm:
    """One loop: what makes the shared transformer its own, and its step."""

    enter: Callable[[], None]
    step: Callable[[], Any]


class GpuScript(Script):
    """The script's loop around a transformer that already has a LoRA, in bf16 by accelerate's autocast."""

    def __init__(self, inputs: Inputs, model: QwenImageTransformer2DModel, lora: list[nn.Parameter], precision: str):
        accelerator = Accelerator(mixed_precision=precision, cpu=model.device.type == "cpu")
        self.set_up(inputs, model, lora, accelerator)


def random_inputs(side: int, text_tokens: int, model: QwenImageTransformer2DModel) -> Inputs:
    """Latents of a picture of side x side pixels and embeddings, on the model's device."""
    generator = torch.Generator(model.device).manual_seed(0)
    options = {"generator": generator, "device": model.device}
    latents = torch.randn(1, 16, side // 8, side // 8, **options)
    return Inputs(latents, torch.randn(1, text_tokens, model.config.joint_attention_dim, **options).to(model.dtype))


def arms(model: QwenImageTransformer2DModel, lora: list[nn.Parameter], side: int, text_tokens: int) -> dict[str, Arm]:
    """The three loops on one transformer and one LoRA, which all of them train on."""
    inputs = random_inputs(side, text_tokens, model)
    script = GpuScript(inputs, model, lora, "bf16" if model.dtype == torch.bfloat16 else "no")
    example = Example(pack(inputs.latents)[0].cpu(), (side // 16, side // 16), 0.5, ())
    checkpointing, optimizer = BlockCheckpointing(model, 0), lora_optimizer("adamw", lora, RATE)
    sampler = BatchSampler([example], (), 1, 0.0, torch.Generator().manual_seed(0))
    passes, eager, gradients = Passes(model.device, model, print), Passes(CPU, model, print), [None] * len(lora)
    state = TrainState(Denoiser(model), lambda prompts: inputs.embeds, lora, optimizer, sampler, checkpointing, passes)
    ours = train_steps(state, Schedule(10**9), SINGLE_PROCESS)

    def enter_ours(capturing: bool) -> None:
        model.enable_gradient_checkpointing(checkpointing._run)
        if capturing:  # the other loops drop the gradients that graphs add to
            for parameter, gradient in zip(lora, gradients, strict=True):
                parameter.grad = gradient
        for module in model.modules():  # what another loop left of its stream
            vars(module).pop(CAST, None)
        state.passes = passes if capturing else eager

    def step_captured() -> None:
        next(ours)
        gradients[:] = [parameter.grad for parameter in lora]

    return {
        "script, checkpointing": Arm(model.enable_gradient_checkpointing, script.step),
        "script": Arm(model.disable_gradient_checkpointing, script.step),
        EAGER: Arm(partial(enter_ours, False), lambda: next(ours)),
        OURS: Arm(partial(enter_ours, True), step_captured),
    }


def timed(candidates: dict[str, Arm], warm_up: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of the loops' steps, in turns, the first ones apart, and peak bytes; a loop out of memory says so.

    Our second step is captured as a CUDA graph, which takes the memory of a step for itself.
    """
    found: dict[str, dict[str, Any]] = {name: {"warm_up_ms": [], "ms": [], "peak_bytes": 0} for name in candidates}
    for number in range(warm_up + rounds):
        for name, arm in candidates.items():
            if "out_of_memory" in found[name]:
                continue
            arm.enter()
            reset_peak()
            try:
                milliseconds = _milliseconds(arm.step)
            except torch.OutOfMemoryError as error:
                found[name] = {"out_of_memory": str(error).split(".")[0]}
                free_memory()
                continue
            found[name]["ms" if number >= warm_up else "warm_up_ms"].append(milliseconds)
            found[name]["peak_bytes"] = max(found[name]["peak_bytes"], peak_bytes() or 0)
    return found


def _milliseconds(step: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


KERNELS = {  # words in their names
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
}


def profiled(arm: Arm) -> dict[str, Any]:
    """One step under PyTorch's profiler: milliseconds of the GPU by kind of kernel, the kernels, those of attention by name."""
    arm.enter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        arm.step()
    gpu = [event for event in recorded.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    found = {"gpu_ms": dict.fromkeys((*KERNELS, "other"), 0.0), "kernels": sum(event.count for event in gpu)}
    for event in gpu:
        kind = next((kind for kind, words in KERNELS.items() if any(word in event.key.lower() for word in words)), "other")
        found["gpu_ms"][kind] += event.self_device_time_total / 1e3
    words = KERNELS["attention"]
    named = [event.key for event in recorded.key_averages() if any(word in event.key.lower() for word in words)]
    return found | {"attention_kernels": sorted(set(named))}


def synchronizations(arm: Arm) -> int:
    """How often one step waits for the GPU, by PyTorch's own count (torch.cuda.set_sync_debug_mode)."""
    arm.enter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arm.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def run(base: BaseModel, sides: tuple[int, ...], lengths: tuple[int, ...], warm_up: int, rounds: int) -> list[dict[str, Any]]:
    """All sizes; one transformer for all of them."""
    model = load_transformer(base)
    lora = add_lora(model, RANK, seed=0)
    found = []
    for side in sides:
        for text_tokens in lengths:
            candidates = arms(model, lora, side, text_tokens)
            entry = {"side": side, "text_tokens": text_tokens, "arms": timed(candidates, warm_up, rounds)}
            entry["profile"] = {OURS: profiled(candidates[OURS])}
            entry["synchronizations"] = {
                name: synchronizations(arm) for name, arm in candidates.items() if "ms" in entry["arms"][name]
            }
            del candidates  # and the memory of their graphs
            free_memory()
            with compiled_blocks(model, True, print):
                compiled = {COMPILED: arms(model, lora, side, text_tokens)[OURS]}
                entry["arms"] |= timed(compiled, warm_up, rounds)
                entry["profile"] |= {name: profiled(arm) for name, arm in compiled.items()}
            del compiled
            free_memory()
            flops = step_flops(TrainConfig(rank=RANK), side, text_tokens)  # of the full size, without recomputation
            for result in entry["arms"].values():
                if "ms" in result:
                    quartiles = statistics.quantiles(result["ms"], n=4)
                    result |= {"median_ms": quartiles[1], "iqr_ms": quartiles[2] - quartiles[0]}
                    result["mfu"] = flops / (quartiles[1] / 1e3) / PEAK_FLOPS
            found.append(entry)
            print(json.dumps(entry), flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| side | text tokens | arm | ms a step (IQR) | MFU | peak GB |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in found:
        for name, arm in entry["arms"].items():
            cells = "out of memory | | "
            if "ms" in arm:
                cells = (
                    f"{arm['median_ms']:.0f} ({arm['iqr_ms']:.0f}) | {arm['mfu']:.0%} | {(arm['peak_bytes'] or 0) / 1e9:.1f}"
                )
            lines.append(f"| {entry['side']} | {entry['text_tokens']} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def profile_table(found: list[dict[str, Any]]) -> str:
    """Where a step's time goes, as a Markdown table."""
    kinds = (*KERNELS, "other")
    lines = ["| side | arm | " + " | ".join(f"{kind}, ms" for kind in kinds) + " | kernels | first step, s |"]
    lines.append("| --- |" + " --- |" * (len(kinds) + 3))
    for entry in found:
        for name, result in entry["profile"].items():
            cells = [f"{result['gpu_ms'][kind]:.0f}" for kind in kinds] + [str(result["kernels"])]
            cells.append(f"{entry['arms'][name]['warm_up_ms'][0] / 1e3:.0f}")
            lines.append(f"| {entry['side']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run at full size on the GPU and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=TIMED)
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--sides", type=int, nargs="*", default=SIDES)
    parser.add_argument("--text-tokens", type=int, nargs="*", default=TEXT_TOKENS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found: make bench times the step on a CPU")
    base = RandomBase("Qwen-Image with random weights", torch.device("cuda"), torch.bfloat16)
    found = run(base, arguments.sides, arguments.text_tokens, arguments.warm_up, arguments.rounds)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rank": RANK,
        "warm_up": arguments.warm_up,
        "rounds": arguments.rounds,
        "sizes": found,
    }
    (arguments.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    write_table(DOCS / "hardware.md", "gpu", table(found))
    write_table(DOCS / "hardware.md", "profile", profile_table(found))
    print(table(found), profile_table(found), sep="\n")


if __name__ == "__main__":
    main()

"""One LoRA training step on one CPU thread: the loop of diffusers' DreamBooth LoRA script for Qwen-Image against ours.

`make bench` times both in one run, interleaved, on a small transformer with seeded random weights, after it has seen that both
compute the same loss and the same LoRA gradients. It writes benchmarks/step.json and a table of docs/hardware.md.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import peft
import torch
from accelerate import Accelerator
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.flops import flop_counter
from checks.docs_tables import write_table
from placeholder.distributed import SINGLE_PROCESS
from placeholder.lora.adapter import add_lora
from placeholder.model.base import QWEN_IMAGE
from placeholder.model.vae import pack
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, initial_embeddings
from placeholder.tokens.prompt_encoder import PromptEncoder
from placeholder.training.examples import BatchSampler, Example, Sample
from placeholder.training.loop import Schedule, TrainState, train_steps
from placeholder.training.losses import Denoiser, sample_losses
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer, token_rms_limit
from placeholder.transformer.checkpointing import BlockCheckpointing, saved_bytes
from placeholder.transformer.compile import CompiledBlocks
from placeholder.transformer.graphs import Passes
from standin.small_base import Size, new_text_encoder, scheduler

BLOCKS, HEADS, HEAD_WIDTH = 6, 4, 64
GRID, TEXT_TOKENS, RANK, RATE = (16, 16), 32, 16, 1e-4
TEXT_LAYERS, WORDS = 2, 1000  # of the text encoder, and the ids below which prompts are drawn
SEED = 0
ROUNDS, BURST = 10, 3  # thirty timed steps of each arm


def transformer() -> QwenImageTransformer2DModel:
    """Six blocks of four 64-wide heads; the same weights every time."""
    torch.manual_seed(SEED)
    model = QwenImageTransformer2DModel(
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=HEADS * HEAD_WIDTH,
        axes_dims_rope=(16, 24, 24),
    )
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Inputs:
    """Latents (1, 16, H, W), already normalized, and prompt embeddings (1, T, D)."""

    latents: Tensor
    embeds: Tensor

    @classmethod
    def random(cls) -> "Inputs":
        generator = torch.Generator().manual_seed(SEED)
        return cls(
            torch.randn(1, 16, 2 * GRID[0], 2 * GRID[1], generator=generator),
            torch.randn(1, TEXT_TOKENS, HEADS * HEAD_WIDTH, generator=generator),
        )


class Script:
    """What one iteration of the script does with --cache_latents, weighting scheme "none", and rank and layers like ours.

    Stated anew from the script at commit 02303d1 of huggingface/diffusers: LoRA through add_adapter, sigmas looked up in
    the scheduler's table, latents packed in every step, the loss on unpacked latents, clip, AdamW, the learning-rate
    schedule, and the loss read for the progress bar.
    """

    def __init__(self, inputs: Inputs, checkpointing: bool, model: QwenImageTransformer2DModel | None = None):
        model = model or transformer()
        torch.manual_seed(SEED)
        model.add_adapter(
            LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                lora_dropout=0.0,
                init_lora_weights="gaussian",
                target_modules=list(QWEN_IMAGE.lora_target_modules),
            )
        )
        if checkpointing:
            model.enable_gradient_checkpointing()
        self.set_up(inputs, model, [p for p in model.parameters() if p.requires_grad], Accelerator(cpu=True))

    def set_up(
        self, inputs: Inputs, model: QwenImageTransformer2DModel, lora: list[nn.Parameter], accelerator: Accelerator
    ) -> None:
        """Everything around a transformer that has its LoRA."""
        self.inputs, self.lora, self.accelerator = inputs, lora, accelerator
        optimizer = torch.optim.AdamW([{"params": lora, "lr": RATE}], betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=1000)
        self.transformer, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.transformer.train()
        self.noise_scheduler = copy.deepcopy(scheduler())

    def loss(self, noise: Tensor, sigmas: Tensor, timesteps: Tensor) -> Tensor:
        """The loss for noise (1, 16, 1, H, W), sigmas (1, 1, 1, 1, 1) and timesteps (1,) in 0 to 1000."""
        latents = self.inputs.latents[:, :, None]  # (1, 16, 1, H, W)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        batch, channels, _, height, width = latents.shape
        packed = QwenImagePipeline._pack_latents(noisy.permute(0, 2, 1, 3, 4), batch, channels, height, width)
        predicted = self.transformer(
            hidden_states=packed,
            encoder_hidden_states=self.inputs.embeds,
            encoder_hidden_states_mask=None,
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * batch,
            return_dict=False,
        )[0]
        predicted = QwenImagePipeline._unpack_latents(predicted, 8 * height, 8 * width, 8)
        weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
        error = weighting.float() * (predicted.float() - (noise - latents).float()) ** 2
        return error.reshape(batch, -1).mean(1).mean()

    def halfway(self) -> Tensor:
        """The loss at a sigma of 0.5."""
        shape = self.inputs.latents[:, :, None].shape
        return self.loss(torch.zeros(shape), torch.full((1, 1, 1, 1, 1), 0.5), torch.tensor([500.0]))

    def step(self) -> None:
        """One iteration of the loop."""
        latents = self.inputs.latents[:, :, None]
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling("none", len(latents), logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
        timesteps = self.noise_scheduler.timesteps[(u * self.noise_scheduler.config.num_train_timesteps).long()]
        timesteps = timesteps.to(latents.device)
        table = self.noise_scheduler.timesteps.to(latents.device)
        found = [(table == t).nonzero().item() for t in timesteps]
        sigmas = self.noise_scheduler.sigmas.to(latents.device, latents.dtype)[found].flatten().view(-1, 1, 1, 1, 1)
        with self.accelerator.accumulate(self.transformer):
            loss = self.loss(noise, sigmas, timesteps)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.transformer.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        loss.detach().item()


class Ours:
    """Our training loop on the same transformer, LoRA and inputs; with `token`, embeddings come from a text encoder instead."""

    def __init__(self, inputs: Inputs, token: bool = False):
        self.transformer = transformer()
        self.lora = add_lora(self.transformer, RANK, SEED)
        token_optimizer, self.encoder = None, None
        ids: tuple[int, ...] = ()
        self.prompt_embeds: Callable = lambda prompts: inputs.embeds
        if token:
            torch.manual_seed(SEED)
            size = Size(text_width=HEADS * HEAD_WIDTH, text_layers=TEXT_LAYERS, blocks=0, heads=0, vae_width=0)
            self.encoder = new_text_encoder(size).model.language_model.requires_grad_(False)
            rows = initial_embeddings(("<zwx>",), size.text_width, 1e-5, torch.Generator().manual_seed(SEED))
            tokens = PlaceholderTokens(WORDS, rows, size.text_width)
            limit = token_rms_limit(self.encoder.embed_tokens.weight, WORDS)
            token_optimizer = TokenOptimizer(tokens.rows, 1e-3, limit)
            self.prompt_embeds = PromptEncoder(self.encoder, tokens)
            words = torch.randint(0, WORDS, (QWEN_IMAGE.dropped_tokens + TEXT_TOKENS - 1,)).tolist()
            ids = (*words, WORDS)
        self.example = Example(pack(inputs.latents)[0], GRID, 0.5, ids)
        self.denoiser = Denoiser(self.transformer)
        self.state = TrainState(
            self.denoiser,
            self.prompt_embeds,
            self.lora,
            lora_optimizer("adamw", self.lora, RATE),
            BatchSampler([self.example], (), 1, 0.0, torch.Generator().manual_seed(SEED)),
            BlockCheckpointing(self.transformer, 0),
            Passes(self.denoiser.device, self.transformer, print),
            token_optimizer,
        )
        self._steps: Iterator = train_steps(self.state, Schedule(10**9), SINGLE_PROCESS)

    def loss(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The loss for packed noise (L, 64) and a sigma ()."""
        sample = Sample(self.example, self.example.input_ids, sigma, noise_seed=0)
        vars(sample)["noise"] = noise  # in the place of its own
        return sample_losses(self.denoiser, self.prompt_embeds, [sample]).mean()

    def halfway(self) -> Tensor:
        """The loss at a sigma of 0.5."""
        return self.loss(torch.zeros_like(self.example.latents), torch.tensor(0.5))

    def step(self) -> None:
        """One step of the loop."""
        next(self._steps)


def compiled_arm() -> Ours:
    """Our loop with compiled blocks."""
    ours = Ours(Inputs.random())
    ours.state.compiled = CompiledBlocks(ours.transformer, _stop)
    return ours


def _stop(warning: str) -> None:
    raise SystemExit(warning)


def arms() -> dict[str, Script | Ours]:
    """What is timed, by name."""
    inputs = Inputs.random()
    return {
        "script, checkpointing": Script(inputs, checkpointing=True),
        "script": Script(inputs, checkpointing=False),
        "ours": Ours(inputs),
        "ours, token": Ours(inputs, token=True),
    }


def gate(script: Script, ours: Ours) -> dict[str, float]:
    """Relative difference of the losses and cosine of the LoRA gradients for the same noise; SystemExit where they differ.

    LoRA's B is zero at first, which leaves A without a gradient, so both get the same B here, and lose it again.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    noise, timestep = torch.randn(script.inputs.latents.shape, generator=generator), torch.tensor([600.0])
    before = [[p.detach().clone() for p in arm.lora] for arm in (script, ours)]
    with torch.no_grad():
        for one, other in zip(script.lora, ours.lora, strict=True):
            one.add_(0.05 * torch.randn(one.shape, generator=generator))
            other.copy_(one)
    losses = (
        script.loss(noise[:, :, None], torch.full((1, 1, 1, 1, 1), 0.6), timestep),
        ours.loss(pack(noise)[0], torch.tensor(0.6)),
    )
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, arm.lora, allow_unused=True, materialize_grads=True)])
        for loss, arm in zip(losses, (script, ours), strict=True)
    ]
    with torch.no_grad():
        for arm, values in zip((script, ours), before, strict=True):
            for parameter, value in zip(arm.lora, values, strict=True):
                parameter.copy_(value)
    difference = abs(losses[0].item() - losses[1].item()) / losses[0].item()
    cosine = nn.functional.cosine_similarity(*gradients, dim=0).item()
    if difference > 1e-4 or cosine < 0.9999:
        raise SystemExit(f"not the same work: losses differ by {difference:.1e}, gradients have a cosine of {cosine:.6f}")
    return {"loss_difference": difference, "gradient_cosine": cosine}


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def counts(arm: Script | Ours) -> dict[str, int]:
    """FLOPs and operations of one step, and the bytes that autograd keeps of its forward pass (checkpointed blocks aside)."""
    with flop_counter() as flops:
        arm.step()
    with _Operations() as operations:
        arm.step()
    return {
        "flops": flops.get_total_flops(),
        "operations": operations.count,
        "saved_bytes": saved_bytes(arm.halfway, arm.transformer.parameters()),
    }


def compiled_counts(compiled: Ours, uncompiled: dict[str, int]) -> dict[str, int | None]:
    """The same of the loop with compiled blocks: FLOPs as uncompiled; operations cannot be counted from outside."""
    kept = saved_bytes(compiled.halfway, compiled.transformer.parameters())
    return uncompiled | {"operations": None, "saved_bytes": kept}


def timings(timed: dict[str, Script | Ours], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` x BURST steps of each arm: in every round each arm makes BURST steps after one that is not timed.

    That one fills the processor's caches anew: a training makes its steps one after another, without three others between them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, arm in timed.items():
            arm.step()
            for _ in range(BURST):
                start = time.perf_counter()
                arm.step()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Check that the arms do the same work, count, time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timed, compiled = arms(), compiled_arm()
    uncompiled_gate = gate(timed["script"], timed["ours"])
    start = time.perf_counter()
    compiled_gate = gate(timed["script"], compiled)  # the first pass, in which all is compiled
    compile_seconds = time.perf_counter() - start
    timed["ours, compiled"] = compiled
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"one thread of {platform.processor() or platform.machine()}",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft)},
        "transformer": f"{BLOCKS} blocks of {HEADS} x {HEAD_WIDTH}, {GRID[0] * GRID[1]} + {TEXT_TOKENS} tokens, rank {RANK}",
        "gate": uncompiled_gate,
        "gate_compiled": compiled_gate,
        "compile_seconds": compile_seconds,
        "arms": {},
    }
    seconds = timings(timed, arguments.rounds)
    for name, arm in timed.items():
        quartiles = statistics.quantiles(seconds[name], n=4)
        record["arms"][name] = {
            "median_ms": 1000 * quartiles[1],
            "iqr_ms": 1000 * (quartiles[2] - quartiles[0]),
            "seconds": seconds[name],
            **(counts(arm) if arm is not compiled else compiled_counts(arm, counts(timed["ours"]))),
        }
    (arguments.output / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    write_table(arguments.output.parent / "docs" / "hardware.md", "step", table(record))
    print(table(record))


def table(record: dict) -> str:
    """The results as a Markdown table, every time beside its ratio to the script's with checkpointing."""
    lines = [
        "| arm | ms a step (IQR) | ratio | GFLOP | operations | MB kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    slowest = record["arms"]["script, checkpointing"]["median_ms"]
    for name, arm in record["arms"].items():
        lines.append(
            f"| {name} | {arm['median_ms']:.0f} ({arm['iqr_ms']:.0f}) | {arm['median_ms'] / slowest:.2f} "
            f"| {arm['flops'] / 1e9:.1f} | {arm['operations'] or '-'} | {arm['saved_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

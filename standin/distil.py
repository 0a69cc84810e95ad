"""Distil a LoRA of few steps for the small base model, which `go_fast` then uses.

The teacher is the base model with guidance along its sampling ODE in many steps; the student, base and LoRA without guidance,
learns to go in one step where the teacher goes in several: the target of progressive distillation (Salimans and Ho 2022,
arXiv:2202.00512), in one round, of a teacher with guidance (Meng et al. 2023, arXiv:2210.03142).
`python -m standin.distil` writes standin/small_base_8steps.safetensors, with the keys of the published file;
standin/distil_check.py judges it.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from placeholder.lora.adapter import A, B
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_scheduler, load_text_encoder, load_tokenizer, load_transformer, load_vae
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, encode_prompts, prompt_ids
from placeholder.training.flow import flow_loss
from standin.denoiser import ramp
from standin.sampler import GUIDANCE
from standin.small_base import build_small_base
from standin.world import SIDE, Scene, held_out, random_caption, random_scene

STUDENT_STEPS = 8
STORED = Path(__file__).with_name(f"small_base_{STUDENT_STEPS}steps.safetensors")
SUBSTEPS = 3  # of the teacher in one of the student's
PATHS, PATHS_AT_ONCE = 768, 64
STEPS, BATCH, RATE = 800, 32, 2e-3
RANK = 32
# The layers of the published file: attention and feed-forward of both streams.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]


@dataclass(frozen=True)
class Paths:
    """The teacher's latents (N + 1, P, L, D) at the student's sigmas (N + 1,), embeddings (P, T, D) and their mask."""

    latents: Tensor
    sigmas: Tensor
    embeds: Tensor
    mask: Tensor


def captions(count: int, seed: int) -> list[str]:
    """Captions of the world, but for the combinations that are kept from pretraining."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene: Scene = random_scene(rng)
        if not held_out(scene):
            found.append(random_caption(scene, rng))
    return found


@torch.no_grad()
def encoded(base: BaseModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (P, T, D), padded with zeros, and their mask (P, T)."""
    tokenizer, encoder = load_tokenizer(base), load_text_encoder(base)
    tokens = PlaceholderTokens(len(tokenizer), {}, encoder.embed_tokens.embedding_dim)
    each = [encode_prompts(encoder, tokens, torch.tensor([prompt_ids(tokenizer, tokens, text)]))[0] for text in prompts]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one), dtype=torch.long) for one in each], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True), mask


def fast_scheduler(base: BaseModel) -> FlowMatchEulerDiscreteScheduler:
    """The base's scheduler as `go_fast` sets it."""
    scheduler = load_scheduler(base)
    return type(scheduler).from_config(scheduler.config, **QWEN_IMAGE.distilled_schedule)


def teach(base: BaseModel, transformer: QwenImageTransformer2DModel, count: int, seed: int) -> Paths:
    """Sample `count` captions with the teacher and keep its latents at the student's sigmas."""
    embeds, mask = encoded(base, [*captions(count, seed), EMPTY_PROMPT])
    empty, empty_mask = embeds[-1:, : mask[-1].sum()], mask[-1:, : mask[-1].sum()]
    pipeline = QwenImagePipeline(fast_scheduler(base), load_vae(base, base.dtype), None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    generator, parts, start = torch.Generator().manual_seed(seed), [], time.monotonic()
    for first in range(0, count, PATHS_AT_ONCE):
        some = slice(first, min(first + PATHS_AT_ONCE, count))
        size = some.stop - some.start
        noise = torch.randn(size, (SIDE // 16) ** 2, transformer.config.in_channels, generator=generator)
        kept = [noise]

        def keep(_pipeline, index: int, _timestep, inputs: dict, kept=kept) -> dict:
            if (index + 1) % SUBSTEPS == 0:
                kept.append(inputs["latents"].clone())
            return inputs

        pipeline(
            prompt_embeds=embeds[some],
            prompt_embeds_mask=mask[some],
            negative_prompt_embeds=empty.repeat(size, 1, 1),
            negative_prompt_embeds_mask=empty_mask.repeat(size, 1),
            true_cfg_scale=GUIDANCE,
            latents=noise,
            width=SIDE,
            height=SIDE,
            num_inference_steps=SUBSTEPS * STUDENT_STEPS,
            output_type="latent",
            callback_on_step_end=keep,
        )
        parts.append(torch.stack(kept))
        print(f"teacher {some.stop}/{count} {time.monotonic() - start:.0f} s", flush=True)
    return Paths(torch.cat(parts, 1), pipeline.scheduler.sigmas[::SUBSTEPS], embeds[:-1], mask[:-1])


def distil(transformer: QwenImageTransformer2DModel, paths: Paths, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Add the LoRA to the transformer and train it; yields step and loss."""
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    widths = paths.sigmas[:-1] - paths.sigmas[1:]  # (N,)
    grid = SIDE // 16
    for step in range(steps):
        # A wide step moves the image further, so that its errors count for more.
        at = torch.multinomial(widths, BATCH, replacement=True)
        which = torch.randint(paths.latents.shape[1], (BATCH,))
        here, there = paths.latents[at, which], paths.latents[at + 1, which]  # (B, L, D)
        target = (here - there) / widths[at, None, None]
        predicted = transformer(
            hidden_states=here,
            timestep=paths.sigmas[at],
            encoder_hidden_states=paths.embeds[which],
            encoder_hidden_states_mask=paths.mask[which],
            img_shapes=[[(1, grid, grid)]] * BATCH,
            return_dict=False,
        )[0]
        loss = flow_loss(predicted, target).mean()
        optimizer.param_groups[0]["lr"] = RATE * ramp(step, steps, warmup=50)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step, loss.item()


def save(transformer: QwenImageTransformer2DModel, path: Path) -> None:
    """Store the LoRA in bf16 under the published file's keys, with an alpha for each layer."""
    stored = {}
    for key, value in get_peft_model_state_dict(transformer, adapter_name="default").items():
        layer = key.removesuffix(A).removesuffix(B)
        stored[layer + (".lora_down.weight" if key.endswith(A) else ".lora_up.weight")] = value.to(torch.bfloat16).contiguous()
        stored[f"{layer}.alpha"] = torch.tensor(float(RANK), dtype=torch.bfloat16)
    save_file(stored, path)


def main() -> None:
    """Sample with the teacher, train the student, and store its LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=PATHS, help="fewer, to try it out")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try it out")
    parser.add_argument("--output", type=Path, default=STORED)
    arguments = parser.parse_args()
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    transformer = load_transformer(base)
    paths = teach(base, transformer, arguments.paths, seed=1)
    start, running = time.monotonic(), None
    for step, loss in distil(transformer, paths, arguments.steps, seed=0):
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"student {step}/{arguments.steps} {time.monotonic() - start:.0f} s loss {running:.4f}", flush=True)
    save(transformer, arguments.output)


if __name__ == "__main__":
    main()

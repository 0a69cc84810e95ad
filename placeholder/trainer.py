"""The training loop: a generator that makes one step after another and yields what each came to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from placeholder.flow import add_noise, flow_loss, sample_sigma, velocity_target
from placeholder.optimizers import RowOptimizer

LORA_MAX_GRAD_NORM = 1.0  # max_grad_norm of diffusers' DreamBooth LoRA scripts

PromptEmbeds = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""From n prompts of one length, as ids, to embeddings (n, T, D)."""


@dataclass(frozen=True)
class Example:
    """One crop of one picture: packed latents fp32 (L, C), its height and width in tokens, its shift, its prompt's ids."""

    latents: Tensor
    grid: tuple[int, int]
    mu: float
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One element of a batch: an example with the prompt, noise (L, C) and noise level () drawn for it."""

    example: Example
    input_ids: tuple[int, ...]
    noise: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, and its loss, fp32 (), still on the device."""

    number: int
    loss: Tensor


def training_steps(
    transformer: QwenImageTransformer2DModel,
    prompt_embeds: PromptEmbeds,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    lora: list[nn.Parameter],
    lora_optimizer: torch.optim.Optimizer,
    row_optimizer: RowOptimizer | None,
    steps: int,
    batch_size: int,
    caption_dropout: float,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Train for `steps` steps of `batch_size` samples; every random number comes from `generator`, on the CPU.

    The gradient is that of the mean loss over the batch. The rows' gradient and the LoRA's are handled apart: a shared clip
    would let the rows' first huge gradients silence the LoRA.
    """
    order = shuffled(len(examples), generator)
    for number in range(1, steps + 1):
        batch = [draw_sample(examples[next(order)], empty_ids, caption_dropout, generator) for _ in range(batch_size)]
        lora_optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=transformer.device)
        for group in grouped(batch):
            part = sample_losses(transformer, prompt_embeds, group).sum() / batch_size
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(lora, LORA_MAX_GRAD_NORM)
        lora_optimizer.step()
        if row_optimizer is not None:
            row_optimizer.step()
        yield Step(number, loss)


def shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Indices below `count` without end, each once before any comes again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def draw_sample(example: Example, empty_ids: tuple[int, ...], caption_dropout: float, generator: torch.Generator) -> Sample:
    """Draw noise, noise level and, with probability `caption_dropout`, the empty prompt."""
    dropped = torch.rand((), generator=generator).item() < caption_dropout
    sigma = sample_sigma(example.mu, generator)
    noise = torch.randn(example.latents.shape, generator=generator)
    return Sample(example, empty_ids if dropped else example.input_ids, noise, sigma)


def grouped(batch: list[Sample]) -> list[list[Sample]]:
    """The batch in groups that can be stacked without padding: of one picture shape and one prompt length."""
    groups: dict[tuple, list[Sample]] = {}
    for sample in batch:
        groups.setdefault((sample.example.grid, len(sample.input_ids)), []).append(sample)
    return list(groups.values())


def sample_losses(transformer: QwenImageTransformer2DModel, prompt_embeds: PromptEmbeds, group: list[Sample]) -> Tensor:
    """The flow-matching loss of each sample of one group: (B,)."""
    device = transformer.device
    latents = torch.stack([sample.example.latents for sample in group]).to(device)  # (B, L, C)
    noise = torch.stack([sample.noise for sample in group]).to(device)  # (B, L, C)
    sigmas = torch.stack([sample.sigma for sample in group]).to(device)  # (B,)
    embeds = prompt_embeds([sample.input_ids for sample in group])  # (B, T, D)
    model_pred = predict_velocity(transformer, add_noise(latents, noise, sigmas), sigmas, embeds, group[0].example.grid)
    return flow_loss(model_pred, velocity_target(latents, noise))


def predict_velocity(
    transformer: QwenImageTransformer2DModel, noisy: Tensor, sigmas: Tensor, prompt_embeds: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The transformer's velocity (B, L, C) for noisy packed latents (B, L, C), sigmas (B,) and embeddings (B, T, D)."""
    with torch.autocast(noisy.device.type, dtype=transformer.dtype, enabled=transformer.dtype == torch.bfloat16):
        return transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=sigmas,
            encoder_hidden_states=prompt_embeds.to(transformer.dtype),
            img_shapes=[[(1, *grid)]] * len(noisy),
            return_dict=False,
        )[0]

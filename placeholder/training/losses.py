"""What the transformer predicts for a group of samples, and how far that is from what it should."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from placeholder.devices import stack_on, to_device
from placeholder.lora.adapter import without_lora
from placeholder.training.examples import Sample
from placeholder.training.flow import add_noise, flow_loss, velocity_target
from placeholder.transformer.modulations import timestep_device

PromptEmbeds = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""From n prompts of one length, as ids, to embeddings (n, T, D)."""


def sample_losses(transformer: nn.Module, prompt_embeds: PromptEmbeds, group: list[Sample]) -> Tensor:
    """The flow-matching loss of each sample of one group: (B,)."""
    latents, noise, sigmas = _stacked(group, transformer.device)
    noisy = add_noise(latents, noise, to_device(sigmas, latents.device))
    embeds = prompt_embeds([sample.input_ids for sample in group])  # (B, T, D)
    model_pred = predict_velocity(transformer, noisy, sigmas, embeds, group[0].example.grid)
    return flow_loss(model_pred, velocity_target(latents, noise), _weights(group, latents.device))


def preservation_losses(
    transformer: nn.Module,
    prompt_embeds: PromptEmbeds,
    group: list[Sample],
    prompts: Sequence[tuple[int, ...]],
) -> Tensor:
    """How far the LoRA moves the prediction for other prompts, as ids of one length, at the samples' noisy latents: (B,).

    The target is the base model's own prediction, with the LoRA off; ai-toolkit calls this differential output preservation.
    """
    latents, noise, sigmas = _stacked(group, transformer.device)
    noisy, grid = add_noise(latents, noise, to_device(sigmas, latents.device)), group[0].example.grid
    embeds = prompt_embeds(prompts)  # (B, T, D)
    with torch.no_grad(), without_lora(transformer):
        target = predict_velocity(transformer, noisy, sigmas, embeds, grid)
    return flow_loss(predict_velocity(transformer, noisy, sigmas, embeds, grid), target)


def _weights(group: list[Sample], device: torch.device) -> Tensor | None:
    """The tokens' weights (B, L) of a group on the device; None where no picture of it has a mask."""
    weights = [sample.example.weights for sample in group]
    if all(found is None for found in weights):
        return None
    length = len(group[0].example.latents)
    return stack_on([torch.ones(length) if found is None else found for found in weights], device)


def _stacked(group: list[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, L, C) and noise (B, L, C) of a group on the device, and its sigmas (B,) on the CPU."""
    latents = stack_on([sample.example.latents for sample in group], device)
    noise = stack_on([sample.noise for sample in group], device)
    return latents, noise, torch.stack([sample.sigma for sample in group])


def predict_velocity(
    transformer: nn.Module, noisy: Tensor, sigmas: Tensor, prompt_embeds: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The transformer's velocity (B, L, C) for noisy packed latents (B, L, C), sigmas (B,) and embeddings (B, T, D)."""
    with torch.autocast(noisy.device.type, dtype=transformer.dtype, enabled=transformer.dtype == torch.bfloat16):
        return transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=to_device(sigmas, timestep_device(transformer)),
            encoder_hidden_states=prompt_embeds.to(transformer.dtype),
            img_shapes=[[(1, *grid)]] * len(noisy),
            return_dict=False,
        )[0]

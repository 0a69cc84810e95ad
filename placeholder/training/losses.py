"""The transformer's prediction for a group of samples, and the losses of flow matching and of prior preservation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from placeholder.devices import stack_on, to_device
from placeholder.lora.adapter import without_lora
from placeholder.training.examples import Sample
from placeholder.training.flow import add_noise, flow_loss, velocity_target
from placeholder.transformer.compile import uncompiled
from placeholder.transformer.modulations import timesteps

PromptEmbeds = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""From n prompts of one length, as ids, to prompt embeddings (n, T, D)."""


class Inputs(NamedTuple):
    """What the losses of a group need, on the device: latents and noise (B, L, C), sigmas (B,), what the transformer takes
    for them, prompt embeddings (B, T, D), and the tokens' weights (B, L), None where no image has a mask.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    weights: Tensor | None


class Denoiser:
    """The transformer as training calls it. Its device and dtype are read once: diffusers walks all modules for either."""

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.device, self.dtype = transformer.device, transformer.dtype

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """What a call takes for sigmas (B,) of the CPU."""
        return timesteps(self.transformer, sigmas, self.device)

    def __call__(self, noisy: Tensor, timestep: Tensor, prompt_embeds: Tensor, grid: tuple[int, int]) -> Tensor:
        """The velocity (B, L, C) for noisy packed latents (B, L, C), `timesteps` and prompt embeddings (B, T, D)."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.transformer(
                hidden_states=noisy.to(self.dtype),
                timestep=timestep,
                encoder_hidden_states=prompt_embeds.to(self.dtype),
                img_shapes=[[(1, *grid)]] * len(noisy),
                return_dict=False,
            )[0]


def inputs_of(denoiser: Denoiser, group: list[Sample], prompt_embeds: Tensor) -> Inputs:
    """What the losses of a group need, with the embeddings (B, T, D) of its prompts."""
    device, sigmas = denoiser.device, torch.stack([sample.sigma for sample in group])
    return Inputs(
        stack_on([sample.example.latents for sample in group], device),
        stack_on([sample.noise for sample in group], device),
        to_device(sigmas, device),
        denoiser.timesteps(sigmas),
        prompt_embeds,
        _weights(group, device),
    )


def sample_losses(denoiser: Denoiser, prompt_embeds: PromptEmbeds, group: list[Sample]) -> Tensor:
    """The flow-matching loss of each sample of one group: (B,)."""
    inputs = inputs_of(denoiser, group, prompt_embeds([sample.input_ids for sample in group]))
    return flow_matching_losses(denoiser, group[0].example.grid, *inputs)


def flow_matching_losses(denoiser: Denoiser, grid: tuple[int, int], *inputs: Tensor | None) -> Tensor:
    """The flow-matching loss of each sample, (B,), from `Inputs`."""
    given = Inputs(*inputs)
    noisy = add_noise(given.latents, given.noise, given.sigmas)
    model_pred = denoiser(noisy, given.timestep, given.prompt_embeds, grid)
    return flow_loss(model_pred, velocity_target(given.latents, given.noise), given.weights)


def preservation_losses(denoiser: Denoiser, grid: tuple[int, int], *inputs: Tensor | None) -> Tensor:
    """The prior preservation loss of each sample, (B,), from `Inputs` with the embeddings of a preserved prompt.

    Masks do not act. It is how far the LoRA moves the prediction from the base model's own at the samples' noisy latents;
    ai-toolkit calls this differential output preservation.
    """
    given = Inputs(*inputs)
    arguments = add_noise(given.latents, given.noise, given.sigmas), given.timestep, given.prompt_embeds, grid
    with torch.no_grad(), without_lora(denoiser.transformer), uncompiled():
        target = denoiser(*arguments)
    return flow_loss(denoiser(*arguments), target)


def _weights(group: list[Sample], device: torch.device) -> Tensor | None:
    """The tokens' weights (B, L) of a group on the device; None where no image of it has a mask."""
    weights = [sample.example.weights for sample in group]
    if all(found is None for found in weights):
        return None
    length = len(group[0].example.latents)
    return stack_on([torch.ones(length) if found is None else found for found in weights], device)

"""The transformer's prediction for a group of samples, and the losses of flow matching and of prior preservation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from placeholder.devices import stack_on, to_device
from placeholder.lora.adapter import without_lora
from placeholder.training.examples import Sample
from placeholder.training.flow import add_noise, flow_loss, velocity_target
from placeholder.transformer.compile import uncompiled
from placeholder.transformer.modulations import timesteps_on_cpu

PromptEmbeds = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""From n prompts of one length, as ids, to prompt embeddings (n, T, D)."""


class Denoiser:
    """The transformer as training calls it. Its device and dtype are read once: diffusers walks all modules for either."""

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.device, self.dtype = transformer.device, transformer.dtype
        self._timestep_device = torch.device("cpu") if timesteps_on_cpu(transformer) else self.device

    def __call__(self, noisy: Tensor, sigmas: Tensor, prompt_embeds: Tensor, grid: tuple[int, int]) -> Tensor:
        """The velocity (B, L, C) for noisy packed latents (B, L, C), sigmas (B,) and prompt embeddings (B, T, D)."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.transformer(
                hidden_states=noisy.to(self.dtype),
                timestep=to_device(sigmas, self._timestep_device),
                encoder_hidden_states=prompt_embeds.to(self.dtype),
                img_shapes=[[(1, *grid)]] * len(noisy),
                return_dict=False,
            )[0]


def sample_losses(denoiser: Denoiser, prompt_embeds: PromptEmbeds, group: list[Sample]) -> Tensor:
    """The flow-matching loss of each sample of one group: (B,)."""
    latents, noise, sigmas = _stacked(group, denoiser.device)
    noisy = add_noise(latents, noise, to_device(sigmas, latents.device))
    embeds = prompt_embeds([sample.input_ids for sample in group])  # (B, T, D)
    model_pred = denoiser(noisy, sigmas, embeds, group[0].example.grid)
    return flow_loss(model_pred, velocity_target(latents, noise), _weights(group, latents.device))


def preservation_losses(
    denoiser: Denoiser, prompt_embeds: PromptEmbeds, group: list[Sample], prompts: Sequence[tuple[int, ...]]
) -> Tensor:
    """The prior preservation loss of each sample, (B,): how far the LoRA moves the prediction for `prompts`, ids of one length.

    The target is the base model's own prediction at the samples' noisy latents; ai-toolkit calls this differential output
    preservation.
    """
    latents, noise, sigmas = _stacked(group, denoiser.device)
    noisy, grid = add_noise(latents, noise, to_device(sigmas, latents.device)), group[0].example.grid
    embeds = prompt_embeds(prompts)  # (B, T, D)
    with torch.no_grad(), without_lora(denoiser.transformer), uncompiled():
        target = denoiser(noisy, sigmas, embeds, grid)
    return flow_loss(denoiser(noisy, sigmas, embeds, grid), target)


def _weights(group: list[Sample], device: torch.device) -> Tensor | None:
    """The tokens' weights (B, L) of a group on the device; None where no image of it has a mask."""
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

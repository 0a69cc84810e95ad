"""Layers whose weights stay in host memory while they do not compute, and how to remove the first-block cache completely."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

PINNED_AT_ONCE = 2**32  # bytes; PyTorch pins the next power of two of what is asked for


class Streamed:
    """The forward pass of a frozen layer with its weights on the device for as long as it computes.

    `weights` (n,) are all of the layer's, one after the other, in host memory. The backward pass copies them again and
    recomputes the layer: gradients reach its input. Diffusers' group offloading is for inference alone, and pins every weight
    anew in each pass or takes up to twice the memory.
    """

    def __init__(self, layer: nn.Module, weights: Tensor, device: torch.device):
        self.forward, self.weights, self.device = layer.forward, weights, device
        self.places = [(module, *named) for module in layer.modules() for named in module.named_parameters(recurse=False)]
        self.sizes = [parameter.numel() for _, _, parameter in self.places]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the layer returns for these arguments."""
        return checkpoint(self._compute, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def _compute(self, *args: Any, **options: Any) -> Any:
        parts = self.weights.to(self.device, non_blocking=True).split(self.sizes)
        try:
            for (module, name, parameter), part in zip(self.places, parts, strict=True):
                setattr(module, name, nn.Parameter(part.view_as(parameter), requires_grad=False))
            return self.forward(*args, **options)
        finally:
            for module, name, parameter in self.places:
                setattr(module, name, parameter)


def checkpoint_layers(layers: Sequence[nn.Module]) -> None:
    """Let layers keep their input alone for the backward pass, as `Streamed` does; on shells, to count their memory."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def stream(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Keep the weights of these layers, which are alike, in host memory; each layer computes on the device, see `Streamed`."""
    step = max(1, PINNED_AT_ONCE // max(1, sum(parameter.nbytes for layer in layers[:1] for parameter in layer.parameters())))
    for first in range(0, len(layers), step):
        some = layers[first : first + step]
        # In the order of Streamed's places; weights of one dtype.
        parameters = [p for layer in some for module in layer.cpu().modules() for p in module.parameters(recurse=False)]
        weights = parameters_to_vector(parameters)
        weights = weights.pin_memory() if device.type == "cuda" else weights
        vector_to_parameters(weights, parameters)
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in some]
        for layer, part in zip(some, weights.split(sizes), strict=True):
            layer.streamed = layer.forward = Streamed(layer, part, device)


def stop_caching(transformer: nn.Module) -> None:
    """Remove diffusers' first-block cache, also one that was applied or removed half way.

    diffusers changes `forward` and three lists of its registry one after the other, and its own removal fails, or leaves the
    changed `forward`, where an interruption fell between two of them.
    """
    for block in transformer.transformer_blocks:
        vars(block).pop("_diffusers_hook", None)
        if streamed := vars(block).get("streamed"):
            block.forward = streamed
        else:
            vars(block).pop("forward", None)  # the class's own is back
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    transformer._cache_config = None

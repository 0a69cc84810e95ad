"""Diffusers hooks on modules, group offloading and the first-block cache, removed completely even if applied half way."""

from collections.abc import Iterable

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep the module's weights in host memory; its layers go to the device one by one while they compute."""
    on_cuda = device.type == "cuda"  # the next layer is fetched on its own stream while one computes
    # Pinned on the fly: pinned in advance, every weight would take the next power of two of host memory.
    apply_group_offloading(module, device, offload_type="leaf_level", use_stream=on_cuda, low_cpu_mem_usage=on_cuda)


def stop_offloading(module: nn.Module) -> None:
    """Remove group offloading; each weight stays where it happens to be, and `offload` can be called again."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a weight may still be on its way to the device
    _unhook(module.modules())


def cache_first_block(transformer: nn.Module) -> None:
    """Skip the other blocks in steps where the first one barely changes."""
    transformer.enable_cache(FirstBlockCacheConfig())


def stop_caching(transformer: nn.Module) -> None:
    """Remove the first-block cache. Offloading stays: its hooks are on the blocks' layers, not on the blocks."""
    _unhook(transformer.transformer_blocks)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    transformer._cache_config = None


def _unhook(modules: Iterable[nn.Module]) -> None:
    """Drop all hooks on these modules, also those that were applied or removed half way.

    diffusers changes `forward` and three lists of its registry one after the other, and its own removal fails, or leaves the
    changed `forward`, where an interruption fell between two of them. Without both entries the class's own forward is back.
    """
    for module in modules:
        vars(module).pop("forward", None)
        vars(module).pop("_diffusers_hook", None)

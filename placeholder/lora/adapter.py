"""LoRA adapters on the transformer, through PEFT: add, read, load, check, overwrite, disable and unload."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from placeholder.errors import quoted
from placeholder.model.base import QWEN_IMAGE
from placeholder.transformer.layers import cast_together, prepare_layers

ADAPTER = "default"
EXTRA_ADAPTER = "extra"  # a second LoRA, in predictions
FAST_ADAPTER = "fast"  # a step-distilled LoRA, in predictions
PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"
MAX_RANK = 2048  # eight times what a training takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_lora(transformer: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Add a trainable LoRA with alpha = rank, A ~ N(0, 1/rank^2) and B = 0; returns its fp32 parameters.

    Only these parameters of the transformer require gradients afterwards.
    """
    targets = list(QWEN_IMAGE.lora_target_modules)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    parameters = []
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameters.append(parameter)
    prepare_layers(transformer, ADAPTER)
    if transformer.dtype != torch.float32:
        cast_together(transformer, ADAPTER, transformer.dtype)
    return parameters


def lora_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """The LoRA's weights for the archive: bf16 on the CPU, keys `transformer_blocks...lora_A.weight` without prefix."""
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in state.items()}


def lora_metadata(transformer: nn.Module) -> dict[str, Any]:
    """The adapter's PEFT configuration (r, alpha, target modules), which diffusers stores in the header; sets sorted."""
    configuration = transformer.peft_config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in configuration.items()}


def load_lora(transformer: nn.Module, state: dict[str, Tensor], adapter: str = ADAPTER) -> None:
    """Load stored weights with alpha = rank into a new adapter at scale 1; adapters that are there stay.

    Raises ValueError for weights that do not fit, see `check_lora`. PEFT ignores keys that it cannot apply, so what it then
    holds is compared with `state`; RuntimeError where they differ.
    """
    check_lora(transformer, state)
    prefixed = {PREFIX + key: value for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # PEFT's, about the second of two adapters
        transformer.load_lora_adapter(prefixed, prefix=PREFIX.removesuffix("."), adapter_name=adapter)
    _maybe_remove_and_reapply_group_offloading(transformer)  # so that the LoRA of an offloaded transformer is offloaded too
    applied = get_peft_model_state_dict(transformer, adapter_name=adapter)
    wrong = applied.keys() ^ state.keys()
    for key in applied.keys() & state.keys():
        if not torch.equal(applied[key].cpu(), state[key].to(applied[key].dtype).cpu()):
            wrong.add(key)
    if wrong:
        transformer.unload_lora()
        raise RuntimeError(f"{len(wrong)} LoRA weights were not applied, among them {quoted(min(wrong))}")


def check_lora(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless every key names a linear layer of this transformer and fits it; only its shapes are read."""
    if not state:
        raise ValueError("the LoRA holds no weights")
    layers = _linear_layers(transformer)
    for key, value in state.items():
        _check_key(layers, key, value, state)


def overwrite_lora(transformer: nn.Module, state: dict[str, Tensor]) -> bool:
    """Copy other weights into the loaded LoRA, which takes a fraction of the time of loading them.

    Returns False, and does nothing, unless layers and ranks are the same and all weights are finite.
    """
    parameters = {
        f"{name}.{part}.weight": getattr(module, part)[ADAPTER].weight
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
        for part in ("lora_A", "lora_B")
    }
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in parameters.items()}:
        return False
    if not all(torch.isfinite(value).all() for value in state.values()):
        return False
    with torch.no_grad():
        for key, value in state.items():
            parameters[key].copy_(value)
    return True


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The base model's predictions within the context: every LoRA is disabled."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The base model's linear layers by name, also under LoRA layers."""
    found = {}
    for name, module in transformer.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear) and not {"base_layer", "lora_A", "lora_B"} & set(name.split(".")):
            found[name] = layer
    return found


def _check_key(layers: dict[str, nn.Linear], key: str, value: Tensor, state: dict[str, Tensor]) -> None:
    module_name = key.removesuffix(A).removesuffix(B)
    layer = layers.get(module_name)
    if layer is None:
        raise ValueError(f"the LoRA does not fit: this base model has no linear layer {quoted(module_name)}")
    down, up = state.get(module_name + A), state.get(module_name + B)
    if down is None or up is None:
        raise ValueError(f"the LoRA is incomplete: {quoted(module_name)} needs both lora_A and lora_B")
    rank = len(down) if down.ndim == 2 else None
    if rank is not None and rank > MAX_RANK:
        raise ValueError(f"the LoRA has rank {rank} at {quoted(module_name)}: at most {MAX_RANK} can be loaded")
    if [tuple(down.shape), tuple(up.shape)] != [(rank, layer.in_features), (layer.out_features, rank)]:
        raise ValueError(
            f"the LoRA does not fit this base model: {quoted(module_name)} has lora_A {tuple(down.shape)} and lora_B "
            f"{tuple(up.shape)}, expected (r, {layer.in_features}) and ({layer.out_features}, r)"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"the LoRA holds NaN or infinite numbers in {quoted(key)}: it is damaged, or its training diverged")

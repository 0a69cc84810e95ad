"""LoRA on the transformer through PEFT: adding it for training, taking its weights out, putting stored weights in."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from placeholder.errors import quoted
from placeholder.transformer.layers import prepare_layers

# Attention of both streams. With the feed-forward layers the archive more than doubles, and Cog hands archives over as base64.
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
ADAPTER = "default"
EXTRA_ADAPTER = "extra"  # a second LoRA beside the first, in predictions
FAST_ADAPTER = "fast"  # a step-distilled LoRA beside them
PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"
MAX_RANK = 2048  # eight times what a training takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNSUPPORTED_METADATA = ("use_dora", "lora_bias", "modules_to_save")


def add_lora(transformer: QwenImageTransformer2DModel, rank: int, seed: int) -> list[nn.Parameter]:
    """Add a trainable LoRA with alpha = rank, A ~ N(0, 1/rank^2) and B = 0; returns its fp32 parameters.

    Only these parameters of the transformer require gradients afterwards.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGET_MODULES)
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
    return parameters


def lora_state_dict(transformer: QwenImageTransformer2DModel) -> dict[str, Tensor]:
    """The LoRA's weights as they are stored: bf16 on the CPU, keys `transformer_blocks...lora_A.weight` without prefix."""
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in state.items()}


def lora_metadata(transformer: QwenImageTransformer2DModel) -> dict[str, Any]:
    """The adapter's PEFT configuration (r, alpha, target modules), as diffusers stores it beside the weights; sets sorted."""
    configuration = transformer.peft_config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in configuration.items()}


def fold_scale(
    state: dict[str, Tensor], metadata: dict[str, Any], alphas: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Tensor]:
    """The same LoRA with alpha = rank, so that it loads at the right strength wherever metadata are dropped.

    `state` has keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r); `metadata` is the PEFT
    configuration it was saved with, empty for alpha = rank; `alphas` are those of single modules, which come first. What is
    scaled is fp32 afterwards: fp16 would lose small numbers. Raises ValueError for keys and settings of other methods.
    """
    others = [name for name in UNSUPPORTED_METADATA if metadata.get(name)]
    if others:
        raise ValueError(f"the LoRA was trained with {', '.join(others)}: only plain LoRA can be loaded")
    folded = {}
    for key, value in state.items():
        if not key.endswith((A, B)):
            raise ValueError(f"the LoRA holds an unknown key {quoted(key)}: expected names that end in {A} or {B}")
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"the LoRA has {quoted(key)} of shape {tuple(value.shape)}: expected two dimensions")
        if value.dtype not in DTYPES:
            raise ValueError(f"the LoRA has {quoted(key)} in {value.dtype}: save it in float32, bfloat16 or float16")
        if key.endswith(B):
            scale = _scale(key.removesuffix(B), value.shape[-1], metadata, alphas)
            value = value if scale == 1 else value.float() * scale
        folded[key] = value
    return folded


def _scale(module: str, rank: int, metadata: dict[str, Any], alphas: Mapping[str, float]) -> float:
    """alpha / rank (alpha / sqrt(rank) for rank-stabilised LoRA, arXiv:2312.03732), 1.0 where no alpha is stored."""
    if module in alphas:
        return alphas[module] / rank
    if "lora_alpha" not in metadata:
        return 1.0
    alpha = metadata["lora_alpha"]
    for name, own in (metadata.get("alpha_pattern") or {}).items():
        name = name.removeprefix("^")
        if module == name or module.endswith("." + name):
            alpha = own
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


def load_lora(transformer: QwenImageTransformer2DModel, state: dict[str, Tensor], adapter: str = ADAPTER) -> None:
    """Put a stored LoRA with alpha = rank on the transformer, at scale 1; another adapter than the first is added to it.

    Raises ValueError unless every key names a linear layer of this transformer and fits it. What PEFT then holds is compared
    with what was given, because a key that is not applied raises nothing there.
    """
    check_lora(transformer, state)
    prefixed = {PREFIX + key: value for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # PEFT's, about the second of two adapters
        transformer.load_lora_adapter(prefixed, prefix=PREFIX.removesuffix("."), adapter_name=adapter)
    _maybe_remove_and_reapply_group_offloading(transformer)  # so that a streamed transformer streams the LoRA too
    applied = get_peft_model_state_dict(transformer, adapter_name=adapter)
    wrong = set(applied) ^ set(state)
    wrong |= {
        key for key in set(applied) & set(state) if not torch.equal(applied[key].cpu(), state[key].to(applied[key].dtype).cpu())
    }
    if wrong:
        unload_lora(transformer)
        raise RuntimeError(f"{len(wrong)} LoRA weights were not applied, among them {min(wrong)}")


def check_lora(transformer: QwenImageTransformer2DModel, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless a stored LoRA can be put on this transformer, of which the shapes alone are read."""
    if not state:
        raise ValueError("the LoRA holds no weights")
    layers = _linear_layers(transformer)
    for key, value in state.items():
        _check_key(layers, key, value, state)


def overwrite_lora(transformer: QwenImageTransformer2DModel, state: dict[str, Tensor]) -> bool:
    """Give the LoRA on the transformer other weights, which takes a fraction of the time of putting another one on.

    False, and nothing is done, unless it has the same layers and ranks and all weights are finite.
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


def scale_lora(transformer: QwenImageTransformer2DModel, scale: float) -> None:
    """Set the strength of the loaded LoRA: W + scale * B A."""
    scale_loras(transformer, {ADAPTER: scale})


def scale_loras(transformer: QwenImageTransformer2DModel, scales: Mapping[str, float]) -> None:
    """Set the strength of every loaded LoRA, by adapter: W + the sum of scale * B A. One that is not named is passed over."""
    transformer.set_adapters(list(scales), weights=list(scales.values()))


def unload_lora(transformer: QwenImageTransformer2DModel) -> None:
    """Take every LoRA off; the transformer is the base model again, bit for bit."""
    transformer.unload_lora()


@contextmanager
def without_lora(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """The base model's predictions for a while: the LoRA stays on the transformer but is passed over."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def _linear_layers(transformer: QwenImageTransformer2DModel) -> dict[str, nn.Linear]:
    """The base model's linear layers by name, also where another LoRA is on them."""
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
        raise ValueError(f"the LoRA was made for another model: this one has no linear layer {quoted(module_name)}")
    down, up = state.get(module_name + A), state.get(module_name + B)
    if down is None or up is None:
        raise ValueError(f"the LoRA is incomplete: {quoted(module_name)} needs both lora_A and lora_B")
    rank = len(down) if down.ndim == 2 else None
    if rank is not None and rank > MAX_RANK:
        raise ValueError(f"the LoRA has rank {rank} at {quoted(module_name)}: at most {MAX_RANK} can be loaded")
    if [tuple(down.shape), tuple(up.shape)] != [(rank, layer.in_features), (layer.out_features, rank)]:
        raise ValueError(
            f"the LoRA was made for another model: {quoted(module_name)} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, "
            f"expected (r, {layer.in_features}) and ({layer.out_features}, r)"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"the LoRA holds NaN or infinite numbers in {quoted(key)}: train it again")

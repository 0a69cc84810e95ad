"""LoRA files of the trainers of Qwen-Image, converted to one form: keys without prefix, alpha = rank (docs/formats.md)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from placeholder.errors import quoted, shown
from placeholder.lora.adapter import DTYPES, PREFIX, A, B
from placeholder.lora.safetensors import read_tensors

MAX_FILE_BYTES = 2 * 1024**3
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT configuration in the safetensors header
FLAT_PREFIX = "lora_unet_"  # kohya's and musubi-tuner's: the dots of the layer's name are underscores
PREFIXES = (PREFIX, "diffusion_model.", "pipe.dit.", FLAT_PREFIX)  # a key with none of them is bare
ALPHA = ".alpha"
ENDINGS = {  # how a key ends: the name of the convention, and how ours ends
    A: ("lora_A", A),
    B: ("lora_A", B),
    ".lora_A.default.weight": ("lora_A.default", A),
    ".lora_B.default.weight": ("lora_A.default", B),
    ".lora_down.weight": ("lora_down", A),
    ".lora_up.weight": ("lora_down", B),
}
OTHER_METHODS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoRA with a Tucker core",
}
UNSUPPORTED_METADATA = ("use_dora", "lora_bias", "modules_to_save")
TEXT_ENCODERS = ("lora_te", "text_encoder")
ALPHA_DTYPES = (*DTYPES, torch.float64, torch.int64, torch.int32)
# Every linear layer of diffusers' QwenImageTransformer2DModel: at its top, and in each of its blocks.
TOP_LAYERS = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
BLOCK_LAYERS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
)
DOTTED_TOP = {layer.replace(".", "_"): layer for layer in TOP_LAYERS}
DOTTED_BLOCK = {layer.replace(".", "_"): layer for layer in BLOCK_LAYERS}
FLAT_BLOCK = re.compile(r"transformer_blocks_([0-9]+)_(\w+)")


def read_lora(name: str, content: bytes) -> dict[str, Tensor]:
    """The LoRA in a safetensors file, see `plain_lora`."""
    return plain_lora(name, *read_tensors(name, content))


def read_lora_file(name: str, path: Path) -> dict[str, Tensor]:
    """The LoRA in a safetensors file of its own, without tokens; the file is not read where it is too large for one."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{name} is {size} bytes: a LoRA has at most {MAX_FILE_BYTES}, is it a base model?")
    return lora_alone(name, path.read_bytes())


def lora_alone(name: str, content: bytes) -> dict[str, Tensor]:
    """The LoRA in a safetensors file; it comes without tokens, and therefore has to change something itself."""
    lora = read_lora(name, content)
    for part in (A, B):
        if not any(value.any() for key, value in lora.items() if key.endswith(part)):
            raise ValueError(f"{name} changes nothing: there is no {part} in it that is not zero")
    return lora


def plain_lora(name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, Tensor]:
    """The LoRA with keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r), alpha / rank in lora_B.

    Raises ValueError, one sentence with the file's `name`, for whatever is not one plain LoRA of the transformer in one format.
    """
    if not tensors:
        raise ValueError(f"{name} is not a LoRA of Qwen-Image: it is empty")
    metadata = _metadata(name, header.get(METADATA_KEY))
    state, alphas, prefixes, conventions = {}, {}, {}, {}
    for key in sorted(tensors):
        _check_method(name, key)
        prefix, module, ending = _split(name, key)
        prefixes.setdefault(prefix, key)
        if ending == ALPHA:
            alphas[module] = _alpha(name, key, tensors[key])
            continue
        convention, own = ENDINGS[ending]
        conventions.setdefault(convention, key)
        state[module + own] = tensors[key]
    for found in (prefixes, conventions):
        if len(found) > 1:
            one, other, *_ = found.values()
            raise ValueError(f"{name} mixes two formats, {quoted(one)} and {quoted(other)}: save it again in one of them")
    for module in alphas:
        if module + A not in state or module + B not in state:
            raise ValueError(f"{name} holds an alpha for {quoted(module)} without both of its weights: it is incomplete")
    if alphas and "lora_alpha" in metadata:
        raise ValueError(
            f"{name} gives its strength twice, as alpha keys and in {METADATA_KEY}: save it again with one of them"
        )
    return fold_scale(state, metadata, alphas)


def fold_scale(state: dict[str, Tensor], metadata: dict[str, Any], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """The same LoRA with alpha = rank, so that it loads at the right strength wherever metadata are dropped.

    `state` has keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r); `metadata` is its PEFT
    configuration, empty for alpha = rank; `alphas` are those of single modules, which come first. Scaled weights are fp32: fp16
    would lose small numbers. Raises ValueError for settings of other methods, and tensors that are no matrices of floats.
    """
    others = [name for name in UNSUPPORTED_METADATA if metadata.get(name)]
    if others:
        raise ValueError(f"the LoRA was trained with {', '.join(others)}: only plain LoRA can be loaded")
    folded = {}
    for key, value in state.items():
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
    """alpha / rank (alpha / sqrt(rank) for rank-stabilized LoRA, arXiv:2312.03732), 1.0 where no alpha is stored."""
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


def _check_method(name: str, key: str) -> None:
    for sign, method in OTHER_METHODS.items():
        if sign in key:
            raise ValueError(f"{name} is a {method} ({quoted(key)}): only plain LoRA can be loaded")
    if key.startswith(TEXT_ENCODERS):
        raise ValueError(f"{name} changes the text encoder ({quoted(key)}): only a LoRA of the transformer alone can be loaded")


def _split(name: str, key: str) -> tuple[str, str, str]:
    """The key's prefix, the name of its layer in diffusers, and its ending."""
    ending = next((ending for ending in (*ENDINGS, ALPHA) if key.endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{name} is not a LoRA of Qwen-Image: it holds {quoted(key)}, expected names that end in {A} or {B}")
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    module = key[len(prefix) : -len(ending)]
    return prefix, _dotted(name, module) if prefix == FLAT_PREFIX else module, ending


def _dotted(name: str, flat: str) -> str:
    """The layer's name with its dots, of which only those of the known layers can be told from underscores."""
    block = FLAT_BLOCK.fullmatch(flat)
    if flat in DOTTED_TOP:
        return DOTTED_TOP[flat]
    if block is None or block[2] not in DOTTED_BLOCK:
        raise ValueError(f"{name} was made for another model: the transformer of Qwen-Image has no layer {quoted(flat)}")
    return f"transformer_blocks.{block[1]}.{DOTTED_BLOCK[block[2]]}"


def _alpha(name: str, key: str, value: Tensor) -> float:
    if value.shape not in ((), (1,)) or value.dtype not in ALPHA_DTYPES:
        raise ValueError(f"{name} has {quoted(key)} of shape {tuple(value.shape)} in {value.dtype}: expected one number")
    alpha = value.item()
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{name} has {quoted(key)} of {alpha}: expected a finite number above 0")
    return alpha


def _metadata(name: str, text: str | None) -> dict[str, Any]:
    """The PEFT configuration in the header, without prefix; empty where the file has none (then alpha = rank)."""
    if text is None:
        return {}
    try:
        metadata = json.loads(text)
        metadata = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
        alphas = [metadata.get("lora_alpha", 1), *(metadata.get("alpha_pattern") or {}).values()]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0 for alpha in alphas):
            raise ValueError(f"lora_alpha and alpha_pattern hold {shown(alphas)}")
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} has unreadable {METADATA_KEY}: save it again with diffusers") from error
    return metadata

"""LoRA files of the trainers of Qwen-Image, converted to one form: keys without prefix, alpha = rank (docs/formats.md)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from placeholder.errors import label, quoted, shown
from placeholder.lora.adapter import DTYPES, PREFIX, A, B
from placeholder.lora.keys import ALPHA, BIASES, ENDINGS, check_method, split_key
from placeholder.lora.safetensors import read_tensors

MAX_FILE_BYTES = 2 * 1024**3
MAX_TOKENS_SHOWN = 64
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT configuration in the safetensors header
TOKENS_KEY = "placeholder_tokens"  # where this package names the tokens of a LoRA there, as a JSON list
TRIGGER_KEY = "modelspec.trigger_phrase"  # where its earlier versions did, as <one>, <two>
UNSUPPORTED_METADATA = ("use_dora", "modules_to_save")
MAX_PATTERNS, MAX_PATTERN = 2000, 200  # of alpha_pattern, and characters of each
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # bf16 holds their numbers exactly
ALPHA_DTYPES = (*DTYPES, torch.float64, torch.int64, torch.int32)


class LoraFile(NamedTuple):
    """A LoRA with alpha = rank and keys without prefix, and the tokens that its file says it was trained with."""

    lora: dict[str, Tensor]
    tokens: tuple[str, ...] = ()


def read_lora(name: str, content: bytes) -> dict[str, Tensor]:
    """The LoRA in a safetensors file, see `plain_lora`."""
    return plain_lora(name, *read_tensors(name, content))


def read_lora_file(name: str, path: Path) -> LoraFile:
    """The LoRA in a safetensors file of its own, without tokens; the file is not read where it is too large for one."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{name} is {size} bytes: a LoRA has at most {MAX_FILE_BYTES}, is it a base model?")
    return lora_alone(name, path.read_bytes())


def lora_alone(name: str, content: bytes, config: bytes | None = None) -> LoraFile:
    """The LoRA in a safetensors file; it comes without embeddings, and therefore has to change something itself.

    `config` is the adapter_config.json that PEFT writes beside its file.
    """
    tensors, header = read_tensors(name, content)
    if config is not None and METADATA_KEY not in header:
        header = header | {METADATA_KEY: config.decode("utf-8", "replace")}
    lora = plain_lora(name, tensors, header)
    for part in (A, B):
        found = [value for key, value in lora.items() if key.endswith(part)]
        if not found:
            raise ValueError(f"{name} has no {part}: it is incomplete, or a full-rank file; only plain LoRA can be loaded")
        if not any(value.any() for value in found):
            raise ValueError(f"{name} changes nothing: there is no {part} in it that is not zero")
    return LoraFile(lora, _tokens(header))


def plain_lora(name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, Tensor]:
    """The LoRA with keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r), alpha / rank in lora_B.

    Raises ValueError, one sentence with the file's `name`, for whatever is not one plain LoRA of the transformer in one format.
    """
    if not tensors:
        raise ValueError(f"{name} holds no weights: copy it again")
    for key in sorted(tensors):
        check_method(name, key)
    metadata = _metadata(name, header.get(METADATA_KEY))
    state, alphas, prefixes, conventions = {}, {}, {}, {}
    for key, value in sorted(tensors.items()):
        if key.endswith(BIASES):
            if value.any():
                raise ValueError(f"{name} changes biases ({quoted(key)}): only plain LoRA can be loaded")
            continue
        prefix, module, ending = split_key(name, key)
        prefixes.setdefault(prefix, key)
        if ending == ALPHA:
            alphas[module] = _alpha(name, key, value)
            continue
        convention, own = ENDINGS[ending]
        conventions.setdefault(convention, key)
        state[module + own] = value.bfloat16() if value.dtype in FP8 else value
    for found in (prefixes, conventions):
        if len(found) > 1:
            one, other, *_ = found.values()
            raise ValueError(f"{name} mixes two formats, {quoted(one)} and {quoted(other)}: save it again in one of them")
    for module in alphas:
        if module + A not in state or module + B not in state:
            raise ValueError(f"{name} holds an alpha for {quoted(module)} without both of its weights: it is incomplete")
    if "lora_alpha" in metadata and any(
        not math.isclose(alpha / len(state[module + A]), _scale(module, len(state[module + A]), metadata, {}), rel_tol=1e-3)
        for module, alpha in alphas.items()
    ):
        raise ValueError(
            f"{name} gives its strength twice, differently, as alpha keys and in {METADATA_KEY}: save it again with one of them"
        )
    return fold_scale(state, metadata, alphas)


def _tokens(header: dict[str, str]) -> tuple[str, ...]:
    """The placeholder tokens that the header names. Trigger phrases of other trainers are words, and not meant."""
    try:
        found = json.loads(header.get(TOKENS_KEY, "null"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        found = re.findall(r"<[^<>\s]+>", header.get(TRIGGER_KEY, ""))
    return tuple(label(token) for token in found if isinstance(token, str))[:MAX_TOKENS_SHOWN]


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
    patterns = metadata.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), alpha)
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


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
        for pattern in metadata.get("alpha_pattern") or {}:
            re.compile(pattern)
            if len(pattern) > MAX_PATTERN or len(metadata["alpha_pattern"]) > MAX_PATTERNS or re.search(r"\)[*+?{]", pattern):
                raise ValueError(f"alpha_pattern holds {shown(pattern)}")  # a repeated group can take for ever
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0 for alpha in alphas):
            raise ValueError(f"lora_alpha and alpha_pattern hold {shown(alphas)}")
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, re.error) as error:
        raise ValueError(f"{name} has unreadable {METADATA_KEY}: save it again with diffusers") from error
    return metadata

"""LoRA files of the trainers of Qwen-Image, converted to one form: keys without prefix, alpha = rank (docs/formats.md)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from placeholder.errors import label, quoted, shown
from placeholder.lora.adapter import DTYPES, PREFIX, A, B
from placeholder.lora.keys import ALPHA, BIASES, ENDINGS, check_method, split_key
from placeholder.lora.safetensors import read_tensors

MAX_FILE_BYTES = 2 * 1024**3
MAX_TOKENS_SHOWN = 64
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT configuration in the safetensors header
TOKENS_KEY = "placeholder_tokens"  # where this package names the tokens of a LoRA there, as a JSON list
UNSUPPORTED_METADATA = ("use_dora", "modules_to_save")
# Initializations that change the base model's weights, which a file of the LoRA alone does not hold (peft.tuners.lora.layer).
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
DEFAULT_ALPHA = LoraConfig().lora_alpha  # of a PEFT configuration that names none
MAX_ALPHA = 1e6
MAX_PATTERNS = 2000  # of alpha_pattern
# A key of it: a layer's name or its end, dots escaped or not; ^ begins a whole name. PEFT takes any regular expression, with
# which a stranger's file could keep the matching busy for ever.
NAME = re.compile(r"\^?(?:[\w-]|\\?\.)+")
BF16_ROUNDING = 4e-3  # 2^-8, of an alpha that is stored in bf16
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # bf16 holds their numbers exactly
ALPHA_DTYPES = (*DTYPES, *FP8, torch.float64, torch.int64, torch.int32)


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
    where = f"{name} has {METADATA_KEY} that"
    if config is not None and METADATA_KEY not in header:
        header = header | {METADATA_KEY: config.decode(json.detect_encoding(config), "replace")}  # as json.loads would
        where = "adapter_config.json"
    lora = plain_lora(name, tensors, header, where)
    for part in (A, B):
        found = [value for key, value in lora.items() if key.endswith(part)]
        if not found:
            raise ValueError(f"{name} has no {part}: it is incomplete, or a full-rank file; only plain LoRA can be loaded")
        if not any(value.any() for value in found):
            raise ValueError(f"{name} changes nothing: there is no {part} in it that is not zero")
    return LoraFile(lora, _tokens(header))


def plain_lora(name: str, tensors: dict[str, Tensor], header: dict[str, str], where: str | None = None) -> dict[str, Tensor]:
    """The LoRA with keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r), alpha / rank in lora_B.

    `where` begins the sentence on a PEFT configuration that cannot be used. Raises ValueError, one sentence with the file's
    `name`, for whatever is not one plain LoRA of the transformer in one format.
    """
    if not tensors:
        raise ValueError(f"{name} holds no weights: copy it again")
    for key in sorted(tensors):
        check_method(name, key)
    metadata = _metadata(where or f"{name} has {METADATA_KEY} that", header.get(METADATA_KEY))
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
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"{name} has {quoted(key)} of shape {tuple(value.shape)}: expected two dimensions")
        state[module + own] = value.bfloat16() if value.dtype in FP8 else value
    for found in (prefixes, conventions):
        if len(found) > 1:
            one, other, *_ = found.values()
            raise ValueError(f"{name} mixes two formats, {quoted(one)} and {quoted(other)}: save it again in one of them")
    for module in alphas:
        if module + A not in state or module + B not in state:
            raise ValueError(f"{name} holds an alpha for {quoted(module)} without both of its weights: it is incomplete")
    if "lora_alpha" in metadata:  # where both say the same, the configuration says it unrounded
        for module in alphas:
            rank = len(state[module + A])
            configured = _scale(module, rank, metadata, {})
            if not math.isclose(alphas[module] / rank, configured, rel_tol=BF16_ROUNDING):
                raise ValueError(
                    f"{name} gives its strength twice, differently, as alpha keys and in its PEFT configuration: "
                    "save it again with one of them"
                )
            alphas[module] = configured * rank
    return fold_scale(state, metadata, alphas)


def _tokens(header: dict[str, str]) -> tuple[str, ...]:
    """The placeholder tokens that the header names."""
    try:
        found = json.loads(header.get(TOKENS_KEY, "[]"))
    except (ValueError, RecursionError):
        return ()
    found = found if isinstance(found, list) else []
    return tuple(label(token) for token in found if isinstance(token, str))[:MAX_TOKENS_SHOWN]


def fold_scale(state: dict[str, Tensor], metadata: dict[str, Any], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """The same LoRA with alpha = rank, so that it loads at the right strength wherever metadata are dropped.

    `state` has keys `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r); `metadata` is its PEFT
    configuration, empty for alpha = rank; `alphas` are those of single modules, which come first. Scaled weights are fp32: fp16
    would lose small numbers. Raises ValueError for settings of other methods, and matrices that are no floats.
    """
    others = [name for name in UNSUPPORTED_METADATA if metadata.get(name)]
    if others:
        raise ValueError(f"the LoRA was trained with {', '.join(others)}: only plain LoRA can be loaded")
    init = str(metadata.get("init_lora_weights")).lower()
    if init.startswith(UNSUPPORTED_INITS):
        raise ValueError(
            f"the LoRA was trained with init_lora_weights {init}, which changes the base model: only plain LoRA can be loaded"
        )
    folded = {}
    for key, value in state.items():
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
    if not metadata:
        return 1.0
    patterns = metadata.get("alpha_pattern") or {}
    default = metadata.get("lora_alpha", DEFAULT_ALPHA)
    whole = f"^.{module}"
    alpha = next((alpha for end, alpha in patterns.items() if whole.endswith(end)), default)
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


def _alpha(name: str, key: str, value: Tensor) -> float:
    if value.shape not in ((), (1,)) or value.dtype not in ALPHA_DTYPES:
        raise ValueError(f"{name} has {quoted(key)} of shape {tuple(value.shape)} in {value.dtype}: expected one number")
    alpha = value.item()
    if not 0 < alpha <= MAX_ALPHA:
        raise ValueError(f"{name} has {quoted(key)} of {alpha}: expected a number above 0, at most {MAX_ALPHA:g}")
    return alpha


def _metadata(where: str, text: str | None) -> dict[str, Any]:
    """The PEFT configuration without prefix, its alpha_pattern by ends of names; empty where there is none (then alpha = rank).

    `where` begins the sentence of the ValueError for a configuration that is damaged or has other patterns.
    """
    if text is None:
        return {}
    try:
        metadata = {key.removeprefix(PREFIX): value for key, value in json.loads(text).items()}
        patterns = metadata.get("alpha_pattern") or {}
        alphas = [metadata.get("lora_alpha", DEFAULT_ALPHA), *patterns.values()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read: save it again") from error
    if not all(isinstance(alpha, int | float) and 0 < alpha <= MAX_ALPHA for alpha in alphas):
        raise ValueError(f"{where} cannot be read: lora_alpha and alpha_pattern hold {shown(alphas)}, expected numbers above 0")
    others = [pattern for pattern in patterns if not NAME.fullmatch(pattern)]
    if others or len(patterns) > MAX_PATTERNS:
        found = shown(others[0]) if others else f"{len(patterns)} patterns"
        raise ValueError(f"{where} holds {found} in alpha_pattern: write the layers' names there, at most {MAX_PATTERNS}")
    # As in PEFT's get_pattern_key the first counts that is the end of a layer's name, from a dot on.
    metadata["alpha_pattern"] = ends = {}
    for pattern, alpha in patterns.items():
        ends.setdefault(re.sub(r"^\^?", r"\g<0>.", pattern.replace("\\", "")), alpha)
    return metadata

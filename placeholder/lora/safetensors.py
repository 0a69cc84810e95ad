"""Untrusted safetensors files: the header is checked before a tensor is made from it."""

import json
from typing import Any

import safetensors
from safetensors.torch import load
from torch import Tensor

from placeholder.errors import HEAD_BYTES, check_download, quoted, reason

MAX_HEADER_BYTES = 4 * 1024**2  # a LoRA of rank 32 on every attention layer of Qwen-Image has 0.2 MB
MAX_SIDE = 2**31  # of a tensor
MAX_DIMENSIONS = 8


def looks_like_safetensors(start: bytes) -> bool:
    """Whether nine bytes begin a safetensors file: eight of header length, then a JSON object (the format's description)."""
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**40


def read_tensors(name: str, content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the metadata in its header; ValueError with the file's `name` for anything else."""
    check_download(name, content[:HEAD_BYTES])
    length = int.from_bytes(content[:8], "little")
    if len(content) >= 8 and length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{name} is not a safetensors file of a LoRA or token: its header claims {length} bytes, "
            f"at most {MAX_HEADER_BYTES} are read"
        )
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a safetensors file ({reason(error)}): copy or download it again") from error
    _check_shapes(name, header)
    try:
        return load(content), header.get("__metadata__") or {}
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:  # the last for sides that overflow together
        raise ValueError(f"{name} is not a safetensors file ({reason(error)}): copy or download it again") from error


def _check_shapes(name: str, header: Any) -> None:
    """The library checks offsets and sizes, but not the sides of tensors that are empty."""
    if not isinstance(header, dict):
        raise ValueError(f"{name} is not a safetensors file (its header is no object): copy or download it again")
    for key, entry in header.items():
        shape = entry.get("shape") if key != "__metadata__" and isinstance(entry, dict) else []
        if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < MAX_SIDE for side in shape):
            raise ValueError(f"{name} holds {quoted(key)} with an impossible shape: copy or download it again")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name} holds {quoted(key)} with {len(shape)} dimensions: copy or download it again")

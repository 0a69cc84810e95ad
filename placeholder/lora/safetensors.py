"""Untrusted safetensors files: the header is checked before a tensor is made from it."""

import json

import safetensors
from safetensors.torch import load
from torch import Tensor

from placeholder.errors import HEAD_BYTES, check_download, reason

MAX_HEADER_BYTES = 4 * 1024**2  # a LoRA of rank 32 on every attention layer of Qwen-Image has 0.2 MB


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
    try:
        return load(content), header.get("__metadata__") or {}
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:  # the last for sides that overflow together
        raise ValueError(f"{name} is not a safetensors file ({reason(error)}): copy or download it again") from error

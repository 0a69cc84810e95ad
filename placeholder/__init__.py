"""Teach Qwen-Image a new subject: LoRA on the transformer, optionally with a fresh zero-prior placeholder token.

`load(pipe, "weights.zip")` and `unload(pipe)` load an archive into a QwenImagePipeline of diffusers and remove it again.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placeholder.pipeline import load, unload

__all__ = ["load", "unload"]

# bitsandbytes, which peft imports, warns on some CPUs about a kernel for inference that the package `kernels` would add.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """The two functions, imported on first use, because importing diffusers takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from placeholder import pipeline

    return getattr(pipeline, name)

"""The same numbers again on the same GPU: PyTorch's deterministic algorithms, asked for while a training runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # cuBLAS is deterministic with it (cuBLAS documentation, "Results reproducibility")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for a while, with a warning where there is none; on a CPU one thread's work is deterministic anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)  # read when the first matrices are multiplied
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled

"""The device: copies that do not wait for it, its memory, deterministic algorithms."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

KEPT_FREE = 0.1  # of the free memory: fragmentation and the libraries' workspaces
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # cuBLAS is deterministic with it (cuBLAS documentation, "Results reproducibility")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied through pinned memory: from pageable memory a copy waits for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def stack_on(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype, of the CPU or of the device, as one (n, ...) on the device; see `to_device`."""
    return to_device(torch.stack(tuple(tensors)), device)


def free_memory() -> None:
    """Give the GPU's memory back that nothing refers to any more; in the host's memory Python's own collector does that."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def unreserved_bytes(device: torch.device) -> int:
    """Bytes that nothing has reserved on the device, PyTorch included: what CUDA graphs keep is not among them."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    free = unreserved_bytes(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else free


def reset_peak() -> None:
    """Let the count of `peak_bytes` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most bytes that PyTorch has had on the GPU at once; None without a GPU, where it keeps no count."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


@contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """Deterministic algorithms alone within the context, where `wanted` on a GPU; one thread of a CPU is deterministic anyway.

    PyTorch raises RuntimeError, which names the operation, for one that has no deterministic algorithm.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)  # read when the first matrices are multiplied
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled

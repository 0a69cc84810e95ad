"""The same numbers again on the same GPU: PyTorch's deterministic algorithms, asked for while a training runs."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # cuBLAS is deterministic with it (cuBLAS documentation, "Results reproducibility")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for a while, with a warning where there is none; on a CPU one thread's work is deterministic anyway.

    Attention goes backwards by one only within `StrictSteps`.
    """
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


class StrictSteps:
    """The steps of a training that may use deterministic algorithms alone, until PyTorch refuses one for the want of it.

    Where it may warn and go on, PyTorch's attention takes the other algorithm, although there is a deterministic one.
    """

    def __init__(self):
        self._refused = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Strict for a while, where deterministic algorithms are asked for at all."""
        if self._refused or not torch.are_deterministic_algorithms_enabled():
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def gives_way(self, error: RuntimeError) -> bool:
        """Whether `error` is such a refusal, with a warning; the steps are not strict any more then."""
        if self._refused or not torch.are_deterministic_algorithms_enabled() or "eterministic" not in str(error):
            return False
        self._refused = True
        warnings.warn(f"the same seed may give other weights on this GPU: {str(error).splitlines()[0]}", stacklevel=2)
        return True

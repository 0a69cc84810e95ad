"""CUDA graphs: a forward and backward pass is recorded once for each size, and its thousands of kernels then start as one.

Without, the host needs longer to start the kernels of a step than the GPU to run them (docs/hardware.md).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.errors import Log, causes, reason

RECORDED_AFTER = 1  # passes of the same sizes, in which libraries load their kernels and choose among them
MOST_RECORDED = 32  # sizes: each takes 40 MB of the GPU beside PyTorch's memory at full size (checks/cuda_graphs.json)

Losses = Callable[..., Tensor]
"""From `arguments` and then tensors, some of them None, to the loss of each sample (B,)."""


class Passes:
    """Forward and backward passes; on a GPU they are recorded where tensors of the same sizes come for the second time.

    What is recorded runs the same kernels in the same order. Gradients are added to those of `parameters` where they lie, so
    that `zero_grad` and not another has to clear them.
    """

    def __init__(self, device: torch.device, parameters: Sequence[nn.Parameter], log: Log):
        self.parameters, self.log = parameters, log
        self.recording = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.recording else None
        self._times: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, Recorded] = {}
        self._pool: Any = None

    def forget(self) -> bool:
        """Drop what was recorded, with its memory, until it is recorded again; returns whether there was anything."""
        anything = bool(self._recorded)
        self._recorded, self._pool = {}, None
        return anything

    def stop_recording(self, why: str) -> None:
        """Go on without; the log has a warning."""
        self.forget()
        self.recording = False
        self.log(f"Warning: the steps could not be recorded as CUDA graphs ({why}): the training goes on without")

    def zero_grad(self) -> None:
        """Clear the gradients."""
        if not self.recording:
            for parameter in self.parameters:
                parameter.grad = None
        elif gradients := [parameter.grad for parameter in self.parameters if parameter.grad is not None]:
            torch._foreach_zero_(gradients)

    def run(self, losses: Losses, arguments: tuple[Hashable, ...], tensors: Sequence[Tensor | None], weight: float) -> Tensor:
        """Add the gradients of weight * sum of losses; returns the sum, fp32 ().

        Those of `tensors` that require gradients get one too. What is returned holds until the next call.
        """
        compute = partial(_forward_and_backward, losses, arguments, weight)
        if not self.recording:
            return compute(tensors)
        sizes = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        key = (losses, arguments, weight, sizes)
        with self._own_stream():
            if key not in self._recorded and self._times[key] >= RECORDED_AFTER and len(self._recorded) < MOST_RECORDED:
                self._record(key, compute, tensors)
            if key in self._recorded:
                return self._recorded[key].replay(tensors)
            found = compute(tensors)
            self._times[key] += 1
            return found

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """One stream for all passes, recorded or not: autograd adds to a gradient on the stream of the first that did."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _record(self, key: Hashable, compute: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._recorded[key] = Recorded(compute, tensors, self._pool, self._stream)
            if len(self._recorded) == MOST_RECORDED:
                self.log(f"CUDA graphs: {MOST_RECORDED} sizes of images and prompts are recorded, others run without")
        except RuntimeError as error:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # one that ends well ends what the failed one left open
                torch.zeros(1, device=tensors[0].device)
            if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes(error)):
                raise
            self.stop_recording(reason(list(causes(error))[-1]))  # the first: those that follow from it say nothing


class Recorded:
    """A computation as a CUDA graph, with tensors of its own that each replay reads and writes."""

    def __init__(self, compute: Callable[..., Tensor], tensors: Sequence[Tensor | None], pool: Any, stream: Any):
        self.tensors = [tensor if tensor is None else _like(tensor) for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool, stream, "thread_local"):  # other threads may go on allocating
            self.found = compute(self.tensors)

    def replay(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """What the computation gives for other tensors of the same sizes."""
        pairs = [(own, given) for own, given in zip(self.tensors, tensors, strict=True) if given is not None]
        for own, given in pairs:
            own.detach().copy_(given)
        self.graph.replay()
        for own, given in pairs:
            given.grad = own.grad
        return self.found


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)


def _forward_and_backward(
    losses: Losses, arguments: tuple[Hashable, ...], weight: float, tensors: Sequence[Tensor | None]
) -> Tensor:
    found = losses(*arguments, *tensors).sum()
    found.backward(torch.full_like(found, weight))
    return found.detach()

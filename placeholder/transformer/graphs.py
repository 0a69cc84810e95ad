"""CUDA graphs: a forward and backward pass is captured once for each set of shapes, and its thousands of kernels start as one.

Without, the host needs longer to start the kernels of a step than the GPU to run them (docs/hardware.md).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.errors import Log, causes, out_of_memory, reason

DEVICE = "cuda"  # where passes are captured
CAPTURED_AFTER = 1  # passes of the same shapes, in which libraries load their kernels and choose among them
MAX_GRAPHS = 32  # each takes 40 MB of the GPU beside PyTorch's memory at full size (checks/cuda_graphs.json)

Losses = Callable[..., Tensor]
"""From `arguments` and then tensors, some of them None, to the loss of each sample (B,)."""


class Passes:
    """Forward and backward passes through a transformer; on a GPU they are captured where shapes come for the second time.

    What is captured runs the same kernels in the same order. Gradients are added to those of the parameters where they lie, so
    `zero_grad` and nothing else may clear them. All graphs share the memory of one step.
    """

    def __init__(self, device: torch.device, transformer: nn.Module, log: Log):
        self.parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.log, self.capturing = log, device.type == DEVICE
        self._stream: Any = None
        if self.capturing:
            self._stream = torch.cuda.Stream(device)
            compute_rotations_anew(transformer)
        self._captured_after, self._times, self._full = CAPTURED_AFTER, Counter(), False
        self._beside = False  # whether a pass runs uncaptured while there are graphs, or ran out of memory so
        self._graphs: dict[Hashable, CapturedPass] = {}
        self._pool: Any = None

    @property
    def holds_memory(self) -> bool:
        """Whether there are graphs."""
        return bool(self._graphs)

    def release(self) -> None:
        """Drop the graphs; they are captured again when their shapes come next."""
        self._graphs, self._pool = {}, None

    def start_again(self) -> None:
        """Drop the graphs, and run all shapes uncaptured first, since other code will run."""
        self.release()
        self._times.clear()
        self._captured_after = max(self._captured_after, CAPTURED_AFTER)

    def give_way(self) -> None:
        """Need less memory: capture new shapes at once, in the memory of the other graphs, or else drop them all."""
        if self._beside and self._captured_after == CAPTURED_AFTER:
            self._captured_after = 0
            self.log("CUDA graphs: no memory for a pass beside them, so other shapes are captured at once from here on")
        else:
            self._drop("out of memory")
        self._beside = False

    def _drop(self, why: str) -> None:
        """Drop the graphs, and wait twice as long with the next: or every new shape would drop them anew."""
        self.start_again()
        self._captured_after *= 2
        self.log(f"CUDA graphs dropped: {why}; from here on a shape is captured after {self._captured_after} passes")

    def stop_capturing(self, why: str) -> None:
        """Go on without; the log has a warning."""
        self.release()
        if self.capturing:
            self.log(f"Warning: the steps could not be captured as CUDA graphs ({why}): the training goes on without")
        self.capturing = False

    def zero_grad(self) -> None:
        """Clear the gradients."""
        if not self.capturing:
            for parameter in self.parameters:
                parameter.grad = None
        elif gradients := [parameter.grad for parameter in self.parameters if parameter.grad is not None]:
            torch._foreach_zero_(gradients)

    def run(self, losses: Losses, arguments: tuple[Hashable, ...], tensors: Sequence[Tensor | None], weight: float) -> Tensor:
        """Add the gradients of weight * sum of losses; returns the sum, fp32 ().

        Those of `tensors` that require gradients get one too. What is returned holds until the next call.
        """
        compute = partial(_forward_and_backward, losses, arguments, weight)
        if self._stream is None:
            return compute(tensors)
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        key = (losses, arguments, weight, shapes)
        with self._own_stream():
            if self.capturing and key not in self._graphs and self._times[key] >= self._captured_after:
                self._capture(key, compute, tensors)
            if self.capturing and key in self._graphs:
                return self._graphs[key].replay(tensors)
            self._beside = self.holds_memory
            found = compute(tensors)
            self._beside = False
            self._times[key] += 1
            return found

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """One stream for all passes: autograd adds to a gradient on the stream where its AccumulateGrad node was made."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _capture(self, key: Hashable, compute: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        if len(self._graphs) == MAX_GRAPHS:
            if not self._full:
                self.log(f"CUDA graphs: {MAX_GRAPHS} shapes of images and prompts are captured, others run without")
            self._full = True
            return
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedPass(compute, tensors, self._pool, self._stream)
        except RuntimeError as error:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), None, self._stream, "thread_local"):
                torch.zeros(1, device=tensors[0].device)  # a capture that ends well ends what the failed one left open
            why = reason(list(causes(error))[-1])  # the first: those that follow from it say nothing
            if out_of_memory(error) or not self._captured_after:
                self._drop("out of memory" if out_of_memory(error) else why)
            else:
                self.stop_capturing(why)


class CapturedPass:
    """A pass as a CUDA graph, with tensors of its own that each replay reads and writes."""

    def __init__(self, compute: Callable[..., Tensor], tensors: Sequence[Tensor | None], pool: Any, stream: Any):
        self.tensors = [tensor if tensor is None else _like(tensor) for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool, stream, "thread_local"):  # other threads may go on allocating
            self.found = compute(self.tensors)

    def replay(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """What the pass gives for other tensors of the same shapes."""
        pairs = [(own, given) for own, given in zip(self.tensors, tensors, strict=True) if given is not None]
        for own, given in pairs:
            own.detach().copy_(given)
        self.graph.replay()
        for own, given in pairs:
            given.grad = own.grad
        return self.found


def compute_rotations_anew(transformer: nn.Module) -> None:
    """Let the transformer compute its rotary embeddings in each pass.

    diffusers caches those of the last 128 image sizes: a graph would go on reading one that the cache has dropped.
    """
    embed = transformer.pos_embed
    embed._compute_video_freqs = partial(type(embed)._compute_video_freqs.__wrapped__, embed)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)


def _forward_and_backward(
    losses: Losses, arguments: tuple[Hashable, ...], weight: float, tensors: Sequence[Tensor | None]
) -> Tensor:
    found = losses(*arguments, *tensors).sum()
    found.backward(torch.full_like(found, weight))
    return found.detach()

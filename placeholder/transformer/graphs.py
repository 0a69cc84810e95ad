"""CUDA graphs: a forward and backward pass is captured once for each set of shapes, and its thousands of kernels start as one.

Without, the host needs longer to start the kernels of a step than the GPU to run them (docs/hardware.md).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.devices import unreserved_bytes
from placeholder.errors import Log, causes, out_of_memory, reason

DEVICE = "cuda"  # where passes are captured
CAPTURED_AFTER = 1  # passes of the same shapes, in which libraries load their kernels and choose among them
# A capture takes a second, which two to four replays earn back; each graph takes 40 MB of the GPU beside PyTorch's memory
# (at full size: docs/hardware.md, checks/cuda_graphs.json).
MAX_GRAPHS, STEPS_A_GRAPH = 32, 16  # so many, or one for so many steps of a longer training
LEFT_FREE = 500 * 10**6  # bytes of the GPU that graphs leave

Losses = Callable[..., Tensor]
"""From `arguments` and then tensors, some of them None, to the loss of each sample (B,)."""


class Passes:
    """Forward and backward passes through a transformer; on a GPU they are captured where shapes come for the second time.

    What is captured runs the same kernels in the same order. Gradients are added to those of the parameters where they lie, so
    `zero_grad` and nothing else may clear them. All graphs share the memory of one step. `steps` are those of the training.
    """

    def __init__(self, device: torch.device, transformer: nn.Module, log: Log, steps: int = 0):
        self.parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.log, self.capturing = log, device.type == DEVICE
        self._stream: Any = None
        if self.capturing:
            self._stream = torch.cuda.Stream(device)
            compute_rotations_anew(transformer)
        self._most, self._full = max(MAX_GRAPHS, steps // STEPS_A_GRAPH), False
        self._captured_after, self._times = CAPTURED_AFTER, Counter()
        self._graphs: dict[Hashable, CapturedPass] = {}
        self._pool: Any = None  # the graphs' memory
        self._in_pool = False  # whether passes that are not captured take theirs from it

    @property
    def holds_memory(self) -> bool:
        """Whether there are graphs."""
        return bool(self._graphs)

    def release(self) -> None:
        """Drop the graphs; they are captured again when their shapes come next."""
        self._graphs, self._pool, self._full = {}, None, False

    def start_again(self) -> None:
        """Drop the graphs, and run all shapes uncaptured first, since other code will run."""
        self.release()
        self._times.clear()

    def give_way(self) -> None:
        """Need less memory: run what is not captured in the memory of the graphs, or else drop them."""
        if self._in_pool:
            self._drop()
        else:
            self._in_pool = True
            self.log("CUDA graphs: out of memory; passes that are not captured use the memory of the graphs from here on")

    def _drop(self) -> None:
        """Drop the graphs, and wait twice as long with the next: or every new shape would drop them anew."""
        self.start_again()
        self._captured_after *= 2
        self.log(f"CUDA graphs dropped: out of memory; from here on a shape is captured after {self._captured_after} passes")

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
            with self._memory_of_graphs() if self._in_pool and self._graphs else nullcontext():
                found = compute(tensors)
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

    @contextmanager
    def _memory_of_graphs(self) -> Iterator[None]:
        """The stream allocates from the graphs' pool, as PyTorch's cudagraph_trees does in passes before a capture.

        Nothing that lasts may be allocated meanwhile: the next replay overwrites it.
        """
        torch.cuda.empty_cache()  # meanwhile PyTorch frees nothing of its cache by itself
        torch._C._cuda_beginAllocateCurrentStreamToPool(torch.cuda.current_device(), self._pool)
        try:
            yield
        finally:
            self._leave_pool()

    def _leave_pool(self) -> None:
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)

    def _has_room(self) -> bool:
        """Whether there may be another graph; where not, there is none until graphs are dropped, and the log says so."""
        if not self._full:
            torch.cuda.empty_cache()
            self._full = len(self._graphs) >= self._most or unreserved_bytes(self._stream.device) < LEFT_FREE
            if self._full:
                self.log(f"CUDA graphs: {len(self._graphs)} shapes of images and prompts are captured, others run without")
        return not self._full

    def _capture(self, key: Hashable, compute: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        if not self._has_room():
            return
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedPass(compute, tensors, self._pool, self._stream)
        except RuntimeError as error:
            with suppress(RuntimeError):  # PyTorch 2.11 goes on allocating in a failed capture's pool (pytorch#180395)
                self._leave_pool()
            with torch.cuda.graph(torch.cuda.CUDAGraph(), None, self._stream, "thread_local"):
                torch.zeros(1, device=tensors[0].device)  # a capture that ends well ends what the failed one left open
            why = reason(list(causes(error))[-1])  # the first: those that follow from it say nothing
            if out_of_memory(error):
                self._drop()
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

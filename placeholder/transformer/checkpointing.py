"""Memory of the training step: what autograd keeps, what is free, and how many blocks have to be checkpointed to fit."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint


def saved_bytes(compute: Callable[[], Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of what `compute` returns.

    The storages of `apart_from`, such as the parameters, are not counted; a storage that is kept twice counts once.
    """
    known = {storage._cdata for tensor in apart_from for storage in storages(tensor)}  # data_ptr() is none of fake tensors
    kept: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept.update((storage._cdata, storage) for storage in storages(tensor) if storage._cdata not in known)
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: those of its parts where it is quantized."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


@dataclass(frozen=True)
class Footprint:
    """Bytes that autograd keeps of one forward pass: of a block, of a block that is checkpointed, of all but the blocks."""

    blocks: int
    block: int
    checkpointed_block: int
    rest: int

    def total(self, checkpointed: int) -> int:
        """Bytes at the height of the backward pass: what is kept, and one block's worth for the gradients of a block."""
        return self.rest + (self.blocks - checkpointed) * self.block + checkpointed * self.checkpointed_block + self.block

    def blocks_to_checkpoint(self, free: int) -> int:
        """The fewest blocks whose activations have to be checkpointed for the step to fit into `free` bytes; all, if none do."""
        missing = self.total(0) - free
        spared = self.block - self.checkpointed_block
        return min(max(math.ceil(missing / spared), 0), self.blocks) if spared > 0 else 0


def measure(transformer: nn.Module, compute: Callable[[], Tensor], apart_from: Iterable[Tensor]) -> Footprint:
    """The footprint of `compute`, a forward pass through the transformer, measured on its first one and two blocks."""
    whole, inputs = transformer.transformer_blocks, [0]

    def note_inputs(block: nn.Module, *args: Any) -> Any:
        inputs[0] = sum(tensor.nbytes for tensor in args[:2])  # the hidden states of both streams
        return block(*args)

    transformer.enable_gradient_checkpointing(note_inputs)
    known = [*apart_from, *transformer.parameters()]
    try:
        kept = []
        for count in (1, 2):
            transformer.transformer_blocks = whole[:count]
            kept.append(saved_bytes(compute, known))
    finally:
        transformer.transformer_blocks = whole
        transformer.disable_gradient_checkpointing()
    block = kept[1] - kept[0]
    return Footprint(len(whole), block, inputs[0], kept[0] - block)


def plain_call(block: nn.Module, *args: Any) -> Any:
    """What the block returns."""
    return block(*args)


def plain_calls() -> Callable[..., Any]:
    """How a block is called, and called again where it is checkpointed."""
    return plain_call


class BlockCheckpointing:
    """Recomputes the activations of the transformer's first `checkpointed` blocks in the backward pass instead of keeping them.

    Gradients are the same bit for bit, whatever the number. `calls` gives for each block of a pass with gradients what calls it, the same when it
    is checkpointed.
    """

    def __init__(self, transformer: nn.Module, checkpointed: int):
        self.checkpointed = checkpointed
        self.calls = plain_calls
        self.blocks = len(transformer.transformer_blocks)
        self._numbers = {block: number for number, block in enumerate(transformer.transformer_blocks)}
        transformer.enable_gradient_checkpointing(self._run)

    def checkpoint_more(self) -> bool:
        """Raise the number by an eighth of the blocks; False where all are checkpointed already."""
        if self.checkpointed == self.blocks:
            return False
        self.checkpointed = min(self.checkpointed + math.ceil(self.blocks / 8), self.blocks)
        return True

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self._numbers[block] < self.checkpointed:
            return checkpoint(self.calls(), block, *args, use_reentrant=False)
        return self.calls()(block, *args)

"""Activation checkpointing block by block, and what autograd keeps of a step with and without it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class BlockCheckpointing:
    """Checkpoints the transformer's first `checkpointed` blocks: their activations are recomputed in the backward pass.

    Gradients are the same bit for bit, whatever the number.
    """

    def __init__(self, transformer: nn.Module, checkpointed: int):
        self.checkpointed = checkpointed
        self.blocks = len(transformer.transformer_blocks)
        self._numbers = {block: number for number, block in enumerate(transformer.transformer_blocks)}
        transformer.enable_gradient_checkpointing(self._run)

    @property
    def all_checkpointed(self) -> bool:
        """Whether no more memory can be saved."""
        return self.checkpointed == self.blocks

    def checkpoint_more(self) -> None:
        """Checkpoint an eighth of the blocks more, or all that are left."""
        self.checkpointed = min(self.checkpointed + math.ceil(self.blocks / 8), self.blocks)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self._numbers[block] >= self.checkpointed:
            return block(*args)
        # A block draws no random numbers: none have to be the same when it is recomputed.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Footprint:
    """Bytes that autograd keeps of one forward pass: of a block, of a checkpointed block, of all but the blocks.

    `lora`: the casts of the LoRA's weights and of their gradients, all of which are there at the end of the backward pass.
    """

    blocks: int
    block: int
    checkpointed_block: int
    rest: int
    lora: int = 0

    def total(self, checkpointed: int) -> int:
        """Peak bytes of the backward pass: what is kept, and one block's worth for the gradients of a block."""
        kept = (self.blocks - checkpointed) * self.block + checkpointed * self.checkpointed_block
        return max(self.rest + kept + self.block, self.lora)

    def blocks_to_checkpoint(self, free: int) -> int:
        """The fewest blocks to checkpoint for the step to fit into `free` bytes; all, if that is not enough."""
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


def saved_bytes(compute: Callable[[], Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of what `compute` returns.

    The storages of `apart_from`, such as the parameters, are not counted; a storage that is kept twice counts once.
    """
    known = {tensor.untyped_storage()._cdata for tensor in apart_from}  # fake tensors have no data_ptr()
    kept: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())

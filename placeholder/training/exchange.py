"""The exchange of gradients between processes: all of them have theirs first, and the memory for it is reserved."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from placeholder.devices import free_memory
from placeholder.distributed import Processes
from placeholder.training.determinism import StrictSteps
from placeholder.transformer.checkpointing import BlockCheckpointing

T = TypeVar("T")
LOSSES = 2  # of the step and of what is preserved
# What computing came to in a process: it may be tried with more blocks checkpointed, or all of them are already.
FITS, RAN_OUT, HOPELESS = 0, 1, 2


def computed_together(
    compute: Callable[[], T], checkpointing: BlockCheckpointing, processes: Processes, strict: StrictSteps
) -> T:
    """What `compute` returns, once it has returned in every process, so that none waits in an exchange to which another never comes.

    Where one of them runs out of CUDA memory, all of them compute again with more blocks checkpointed: the others would wait
    for it anyway. Raises torch.OutOfMemoryError in all of them once that one recomputes every block already.
    """
    while True:
        try:
            with strict():
                found = compute()
            outcome = processes.all_reduce_max(FITS)
            if outcome == FITS:
                return found
        except torch.OutOfMemoryError:
            outcome = processes.all_reduce_max(HOPELESS if checkpointing.checkpointed == checkpointing.blocks else RAN_OUT)
            if outcome == HOPELESS:
                raise
        except RuntimeError as error:
            if not strict.gives_way(error):
                raise
            outcome = FITS
        if outcome == HOPELESS:
            raise torch.OutOfMemoryError("out of memory in another process, with every block checkpointed")
        if outcome == RAN_OUT:
            checkpointing.checkpoint_more()
        free_memory()


class GradientExchange:
    """Adds gradients and losses up over the processes, in place, in fp32 and in one go.

    Its memory is taken, and an exchange of its full size made, before the first step: the steps then find out how much is left
    for their activations, and the exchange itself cannot run out of it. The plan counts it (plan.py).
    Raises torch.OutOfMemoryError in every process where it does not fit into the memory of one.
    """

    def __init__(self, processes: Processes, lora: list[nn.Parameter], rows: nn.Parameter | None):
        self.processes, self.lora, self.rows = processes, lora, rows
        if processes.world_size == 1:
            return
        size = LOSSES + sum(parameter.numel() for parameter in lora) + (0 if rows is None else rows.numel())
        reserved = None
        try:
            reserved = torch.zeros(size, device=lora[0].device)
        finally:
            failed = processes.all_reduce_max(reserved is None)
        if failed:
            raise torch.OutOfMemoryError("out of memory for the exchange of gradients, in another process")
        self._reserved = reserved
        processes.all_reduce_sum(reserved)  # NCCL takes its own memory for an exchange when it makes the first of the kind

    def add_up(self, losses: list[Tensor], rows_learn: bool) -> None:
        """Add the gradients and at most LOSSES losses up; without a placeholder in any prompt the rows have no gradient."""
        if self.processes.world_size == 1:
            return
        # The last block's text stream ends unread: its LoRA has no gradient, in no process.
        tensors = [*losses, *(parameter.grad for parameter in self.lora if parameter.grad is not None)]
        if self.rows is not None and rows_learn:
            self.rows.grad = torch.zeros_like(self.rows) if self.rows.grad is None else self.rows.grad
            tensors.append(self.rows.grad)
        sizes = [tensor.numel() for tensor in tensors]
        total = self._reserved[: sum(sizes)]
        torch.cat([tensor.flatten() for tensor in tensors], out=total)
        self.processes.all_reduce_sum(total)
        for tensor, part in zip(tensors, total.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

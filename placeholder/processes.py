"""The processes that train together, each on its own GPU: the same random numbers in each, gradients added up."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")
# How long the processes wait for one that downloads the base model, draws samples or writes a checkpoint.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is."""

    count: int = 1
    index: int = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """Join the group that torchrun or accelerate launch has set up; alone where there is none."""
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.num_processes, state.process_index)

    def share(self, batch: list[T]) -> list[T]:
        """This process's part of a batch that all of them know."""
        return batch[self.index :: self.count]

    def agree(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def gather(self, part: list[T]) -> list[T]:
        """What every process brings, in all of them, those of the first one in front."""
        return part if self.count == 1 else gather_object(part)

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers, in all of them."""
        return number if self.count == 1 else min(gather_object([number]))

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the processes: one exchange of all of them in fp32."""
        if self.count == 1:
            return
        total = torch.cat([tensor.float().flatten() for tensor in tensors])
        torch.distributed.all_reduce(total)
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

"""The processes that train together, each on its own GPU: the same random numbers in each, gradients added up."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

T = TypeVar("T")
# How long all of them may take to come together, and to add their gradients up once all have them.
JOINING = timedelta(minutes=10)
# How long the processes wait for one that downloads the base model, draws samples or writes a checkpoint.
PATIENCE = timedelta(hours=2)


class LostProcessError(RuntimeError):
    """One sentence about a process of the training that has ended, or whose machine is out of reach."""


@dataclass(frozen=True)
class Processes:
    """How many processes train together, which of them this is, and which it is on its machine.

    What they agree on goes through `group`, on the CPU: so no GPU waits for it, and a process that has ended is noticed at once.
    Every method but `share` has to be called in all of them, and raises LostProcessError where one of them has gone.
    """

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def from_environment(cls) -> "Processes":
        """Join the group that torchrun or accelerate launch has set up; alone where there is none.

        Raises ValueError where accelerate was to start several processes and starts one, as it does with --cpu,
        and LostProcessError where not all of them come.
        """
        with _together():
            state = PartialState(cpu=not torch.cuda.is_available(), timeout=JOINING)
            if state.num_processes > 1:
                group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
                return cls(state.num_processes, state.process_index, state.local_process_index, group)
        # accelerate sets the address where it is to start several.
        if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            raise ValueError(
                "accelerate launch was to start several processes and started this one alone: give it --multi_gpu and no --cpu, "
                "which works without a GPU too; for one process unset MASTER_ADDR"
            )
        return cls()

    def shard(self, batch: list[T]) -> list[T]:
        """This process's part of a batch that all of them know."""
        return batch[self.rank :: self.world_size]

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world_size == 1:
            return value
        found = [value]
        with _together():
            torch.distributed.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def all_gather(self, part: list[T]) -> list[T]:
        """What every process brings, in all of them, those of the first one in front."""
        if self.world_size == 1:
            return part
        found: list[list[T]] = [[] for _ in range(self.world_size)]
        with _together():
            torch.distributed.all_gather_object(found, part, group=self.group)
        return [value for values in found for value in values]

    def all_reduce_min(self, number: int) -> int:
        """The smallest of the processes' numbers, in all of them."""
        return -self.all_reduce_max(-number)

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers, in all of them."""
        if self.world_size == 1:
            return number
        found = torch.tensor(number)
        with _together():
            torch.distributed.all_reduce(found, ReduceOp.MAX, group=self.group)
        return int(found)

    def barrier(self) -> None:
        """Go on when all of them have come here."""
        self.all_reduce_max(0)

    def check_same(self, what: str, value: Any) -> None:
        """Raise ValueError, which names `what`, in all of them unless all have the same value."""
        found = self.all_gather([value])
        if different := [str(number) for number, other in enumerate(found) if other != found[0]]:
            raise ValueError(
                f"process {', '.join(different)} of this training has {what} other than process 0: give every machine the same"
            )

    def all_reduce_sum(self, total: Tensor) -> None:
        """Replace a tensor on the device, in place, by its sum over the processes."""
        if self.world_size > 1:
            with _together():
                torch.distributed.all_reduce(total)


@contextmanager
def _together() -> Iterator[None]:
    """Say in a sentence that a process was lost, whichever library noticed it; other errors pass as they are."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[[^\]]*\] *", "", str(error).split("\n")[0]).split(". ")[0]
        raise LostProcessError(
            f"another process of this training has ended or is out of reach, see the log of its machine ({reason})"
        ) from error


SINGLE_PROCESS = Processes()

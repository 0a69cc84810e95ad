"""The processes that train together, one a GPU, on one machine or several."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
# For all processes to come together, and for NCCL to add up gradients that all of them have.
JOIN_TIMEOUT = timedelta(minutes=10)
# For the one process that downloads the base model, samples images or writes a checkpoint.
WAIT_TIMEOUT = timedelta(hours=2)


class LostProcessError(RuntimeError):
    """One sentence about a process of the training that has ended, or whose machine is out of reach."""


@dataclass(frozen=True)
class Processes:
    """The group of processes, and this one's rank in it.

    Everything but gradients goes through `group`, gloo on the CPU: no GPU waits for it, and a lost process is noticed at once.
    Every method but `shard` has to be called in all processes, and raises LostProcessError where one of them is lost.
    """

    world_size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def from_environment(cls) -> "Processes":
        """Join the group that torchrun or accelerate launch has set up; a single process where there is none."""
        with _lost_process():
            state = PartialState(cpu=not torch.cuda.is_available(), timeout=JOIN_TIMEOUT)
            if state.num_processes == 1:
                return cls()
            group = torch.distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
            return cls(state.num_processes, state.process_index, group)

    def shard(self, batch: list[T]) -> list[T]:
        """This process's part of a batch that all of them know."""
        return batch[self.rank :: self.world_size]

    def all_gather(self, part: list[T]) -> list[T]:
        """The parts of all processes in the order of their ranks."""
        if self.world_size == 1:
            return part
        parts: list[list[T]] = [[] for _ in range(self.world_size)]
        with _lost_process():
            torch.distributed.all_gather_object(parts, part, group=self.group)
        return [value for found in parts for value in found]

    def check_same(self, what: str, value: Any) -> None:
        """Raise ValueError in all processes unless they have the same value; `what` names it."""
        found = self.all_gather([value])
        if different := [str(rank) for rank, other in enumerate(found) if other != found[0]]:
            raise ValueError(
                f"process {', '.join(different)} of this training and process 0 differ in {what}: give every machine the same"
            )

    def all_reduce_sum(self, total: Tensor) -> None:
        """Replace a tensor on the device, in place, by its sum over the processes."""
        if self.world_size > 1:
            with _lost_process():
                torch.distributed.all_reduce(total)


@contextmanager
def _lost_process() -> Iterator[None]:
    """Raise LostProcessError for what NCCL or gloo says of a lost process; other errors pass as they are."""
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

"""The exchange of gradients: what it adds up, and that the steps take no memory for it."""

import torch
from torch import nn

from placeholder.distributed import Processes
from placeholder.training.exchange import GradientExchange


class Twins(Processes):
    """Two processes with the same gradients, without a second one."""

    def most(self, number: int) -> int:
        return number

    def add_up(self, total: torch.Tensor) -> None:
        exchanged.append((total.data_ptr(), total.numel()))
        total.mul_(2)


exchanged: list[tuple[int, int]] = []


def test_gradients_and_losses_are_added_up_in_memory_that_is_reserved_once():
    exchanged.clear()
    lora = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    rows = nn.Parameter(torch.zeros(1, 5))
    exchange = GradientExchange(Twins(count=2), lora, rows)
    ((reserved, size),) = exchanged
    assert size == 2 + 6 + 4 + 5
    for step in (1.0, 2.0):
        lora[0].grad = torch.full((2, 3), step)
        rows.grad = None
        losses = [torch.tensor(step), torch.tensor(3 * step)]
        exchange.add_up(losses, rows_learn=step > 1)
        assert torch.equal(lora[0].grad, torch.full((2, 3), 2 * step)) and lora[1].grad is None
        assert (rows.grad is not None) == (step > 1)
        assert [loss.item() for loss in losses] == [2 * step, 6 * step]
    rows.grad = torch.arange(5.0)[None]
    exchange.add_up([torch.tensor(1.0)], rows_learn=True)
    assert torch.equal(rows.grad, 2 * torch.arange(5.0)[None])
    assert exchanged[1:] == [(reserved, 2 + 6), (reserved, 2 + 6 + 5), (reserved, 1 + 6 + 5)]


def test_a_process_alone_reserves_and_changes_nothing():
    lora = [nn.Parameter(torch.zeros(3))]
    lora[0].grad = torch.ones(3)
    exchange = GradientExchange(Processes(), lora, None)
    exchange.add_up([torch.tensor(1.0)], rows_learn=False)
    assert torch.equal(lora[0].grad, torch.ones(3)) and not hasattr(exchange, "_reserved")

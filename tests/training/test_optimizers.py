"""The optimizers: each of the LoRA's makes progress; the rows' own normalizes, warms up, decays nothing and is limited."""

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn

from placeholder.config import OPTIMIZERS
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer, token_rms_limit

NO_LIMIT = 1e9


def rows_of(*values: float, width: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values).view(-1, 1).repeat(1, width))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_simple_loss(name):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(128, 64, generator=generator))  # large enough for 8-bit states
    target = torch.randn(128, 64, generator=generator)
    optimizer = lora_optimizer(name, [parameter], 1e-2)
    losses = []
    for _ in range(100):
        parameter.grad = None
        loss = (parameter - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["adamw8bit", "adam8bit"])
def test_the_8_bit_optimizers_hold_their_state_in_8_bits(name):
    parameter = nn.Parameter(torch.ones(128, 64))
    optimizer = lora_optimizer(name, [parameter], 1e-3)
    parameter.sum().backward()
    optimizer.step()
    kept = optimizer.optimizer.state[optimizer.vector].values()
    states = [value for value in kept if torch.is_tensor(value) and value.numel() == 128 * 64]
    assert states
    assert all(state.dtype == torch.uint8 for state in states)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4), (4, 8), (16, 2))]


def test_prodigy_of_all_parameters_as_one_is_prodigy_of_each_and_reads_the_device_twice_a_step(monkeypatch):
    reads, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(tensor) or item(tensor))

    def trained(chosen: list[nn.Parameter], optimizer) -> list[torch.Tensor]:
        for _ in range(40):
            for parameter in chosen:
                parameter.grad = None
            sum((parameter - 3).square().mean() for parameter in chosen).backward()
            optimizer.step()
        return [parameter.detach() for parameter in chosen]

    flat, apart = parameters(), parameters()
    found = trained(flat, lora_optimizer("prodigy", flat, 1e-3))
    assert len(reads) == 2 * 40
    options = {"lr": 1.0, "weight_decay": 1e-4, "use_bias_correction": True, "safeguard_warmup": True}
    expected = trained(apart, Prodigy(apart, **options))
    assert len(reads) == 2 * 40 * (1 + len(apart))
    for one, other, start in zip(found, expected, parameters(), strict=True):
        torch.testing.assert_close(one - start, other - start, rtol=1e-2, atol=1e-7)
        assert (one - start).abs().min() > 1e-4


def test_a_parameter_without_a_gradient_stays_as_it_is():
    chosen = parameters()
    optimizer = lora_optimizer("adam8bit", chosen, 1e-2)
    chosen[0].sum().backward()
    optimizer.step()
    moved = [not torch.equal(parameter, start) for parameter, start in zip(chosen, parameters(), strict=True)]
    assert moved == [True, False, False]


def test_adam8bit_alone_has_no_weight_decay():
    for name in ("adamw", "adamw8bit", "prodigy"):
        assert lora_optimizer(name, [nn.Parameter(torch.ones(1))], 1e-3).param_groups[0]["weight_decay"] == 1e-4
    assert lora_optimizer("adam8bit", [nn.Parameter(torch.ones(1))], 1e-3).param_groups[0]["weight_decay"] == 0


def test_each_row_has_its_gradient_normalized_apart():
    rows, alone = rows_of(0.1, 0.2), rows_of(0.2)
    both, single = TokenOptimizer(rows, 1e-2, NO_LIMIT), TokenOptimizer(alone, 1e-2, NO_LIMIT)
    for step in range(5):
        gradient = torch.linspace(-1, 2, 8) * (step + 1)
        rows.grad = torch.stack([1e5 * gradient.flip(0), gradient])
        alone.grad = gradient[None]
        both.step()
        single.step()
    assert torch.equal(rows[1], alone[0])


def test_a_row_never_outgrows_the_limit_and_a_smaller_one_is_left_alone():
    rows = rows_of(0.0, 0.0)
    optimizer = TokenOptimizer(rows, 1.0, rms_limit=0.25)
    for _ in range(20):
        rows.grad = torch.stack([torch.linspace(-1, 2, 8), torch.zeros(8)])
        optimizer.step()
    rms = rows.detach().square().mean(dim=1).sqrt()
    assert rms[0].item() == pytest.approx(0.25, rel=1e-5)
    assert rms[1].item() == 0
    assert rows[0].std() > 0.1  # scaled as a whole, not clipped to one value


def test_the_limit_is_one_and_a_half_times_the_median_row_of_the_true_entries():
    vocabulary = torch.cat([torch.full((3, 4), 1.0), torch.full((4, 4), -2.0), torch.full((4, 4), 100.0), torch.zeros(90, 4)])
    assert token_rms_limit(vocabulary, 9) == pytest.approx(3.0)
    assert token_rms_limit(vocabulary.bfloat16(), 11) == pytest.approx(3.0)

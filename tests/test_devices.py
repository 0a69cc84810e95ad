"""Copies to the device: a training step on the meta device, whose tensors cannot be mixed with the CPU's, as on a GPU."""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.devices import stack_on, to_device
from placeholder.distributed import SINGLE_PROCESS
from placeholder.model.loading import load_text_encoder
from placeholder.training.examples import Position, draw_batch
from placeholder.training.loop import TrainState, gradients
from placeholder.training.optimizers import RowOptimizer
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.modulations import tabulate
from tests.training.test_loop import Parts

CPU, META = torch.device("cpu"), torch.device("meta")


def test_tensors_are_stacked_where_they_are_to_be():
    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(stack_on([ones, twos], CPU), torch.stack([ones, twos]))
    assert stack_on([ones, twos], META).device == META
    assert stack_on([ones.to(META), twos.to(META)], META).shape == (2, 2, 3)
    assert stack_on([ones.bfloat16()], CPU).dtype == torch.bfloat16
    assert to_device(ones, META).device == META


class AnySigma(defaultdict):
    """Every sigma in the first row."""

    def __contains__(self, _sigma: float) -> bool:
        return True


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("latents", [CPU, META])
def test_a_step_brings_everything_to_the_device(base, tokenizer, monkeypatch, tabled, latents):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    parts = Parts(base, tokenizer, load_text_encoder(base))
    if tabled:
        tabulate(parts.transformer, torch.tensor([0.5]), CPU)
        parts.transformer.time_text_embed.numbers = AnySigma(int)
    for module in (parts.transformer, parts.tokens, parts.prompt_embeds.text_encoder):
        module.to(META)
    parts.prompt_embeds.cache([parts.empty_ids])
    lora = [parameter for parameter in parts.transformer.parameters() if parameter.requires_grad]
    row_optimizer = RowOptimizer(parts.tokens.rows, 1e-3, 1.0)
    optimizer, checkpointing = torch.optim.SGD(lora, lr=0.0), BlockCheckpointing(parts.transformer, 1)
    train_state = TrainState(parts.transformer, parts.prompt_embeds, lora, optimizer, checkpointing, row_optimizer)
    examples = [
        replace(
            example,
            latents=example.latents.to(latents),
            preserved=(parts.empty_ids,),
            weights=torch.ones(len(example.latents)),
        )
        for example in parts.examples
    ]
    position = Position(torch.Generator().manual_seed(0))
    batch = draw_batch(examples, parts.empty_ids, TrainConfig(batch_size=3), position, SINGLE_PROCESS)
    loss, preservation = gradients(train_state, batch, len(batch), 1.0)
    row_optimizer.step()
    assert loss.device == preservation.device == META
    assert all(parameter.grad is None or parameter.grad.device == META for parameter in lora)

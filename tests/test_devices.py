"""Copies to the device: a training step on the meta device, whose tensors cannot be mixed with the CPU's, as on a GPU."""

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from placeholder.devices import WORKSPACE, WORKSPACE_VARIABLE, deterministic
from placeholder.model.loading import load_text_encoder
from placeholder.training.flow import sigma_grid
from placeholder.training.loop import TrainState, gradients
from placeholder.training.losses import Denoiser
from placeholder.training.optimizers import TokenOptimizer
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.graphs import Passes
from placeholder.transformer.modulations import tabulate
from tests.training.test_loop import Parts

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("latents", [CPU, META])
def test_a_step_brings_everything_to_the_device(base, tokenizer, monkeypatch, tabled, latents):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    parts = Parts(base, tokenizer, load_text_encoder(base))
    if tabled:
        tabulate(parts.transformer, sigma_grid(), CPU)
    for module in (parts.transformer, parts.tokens, parts.prompt_embeds.text_encoder):
        module.to(META)
    parts.prompt_embeds.cache([parts.empty_ids])
    lora = [parameter for parameter in parts.transformer.parameters() if parameter.requires_grad]
    tokens = TokenOptimizer(parts.tokens.rows, 1e-3, 1.0)
    examples = [
        replace(
            example,
            latents=example.latents.to(latents),
            preserved=(parts.empty_ids,),
            weights=torch.ones(len(example.latents)),
        )
        for example in parts.examples
    ]
    sampler, checkpointing = parts.sampler(batch_size=2, examples=examples), BlockCheckpointing(parts.transformer, 1)
    optimizer, denoiser = torch.optim.SGD(lora, lr=0.0), Denoiser(parts.transformer)
    passes = Passes(META, parts.transformer, print)
    state = TrainState(denoiser, parts.prompt_embeds, lora, optimizer, sampler, checkpointing, passes, tokens)
    loss, preservation = gradients(state, sampler.next_batch(), 2, 1.0)
    tokens.step()
    assert loss.device == preservation.device == META
    assert all(parameter.grad is None or parameter.grad.device == META for parameter in lora)


def test_deterministic_algorithms_are_used_where_they_are_wanted_on_a_gpu(monkeypatch):
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    with deterministic(torch.device("cuda"), True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACE_VARIABLE] == WORKSPACE
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    for device, wanted in ((CPU, True), (torch.device("cuda"), False)):
        with deterministic(device, wanted):
            assert not torch.are_deterministic_algorithms_enabled()

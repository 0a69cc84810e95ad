"""The token gate on a transformer: in which samples of a batch an adapter acts, and that the others are the base model's."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from placeholder.lora.adapter import ADAPTER, EXTRA_ADAPTER, load_lora, without_lora
from placeholder.lora.gate import TokenGate, gated
from placeholder.model.loading import load_transformer
from placeholder.transformer.layers import FusedLoraAddition
from tests.lora.test_adapter import MODULES, random_lora

SAMPLES, TEXT, GRID = 3, 5, (4, 4)


@pytest.fixture
def transformer(base) -> QwenImageTransformer2DModel:
    """The tiny transformer with two LoRAs."""
    loaded = load_transformer(base)
    load_lora(loaded, random_lora(4, seed=1))
    load_lora(loaded, random_lora(3, seed=2, modules=MODULES[6:]), EXTRA_ADAPTER)
    return loaded


@pytest.fixture(scope="module")
def embeds(base) -> torch.Tensor:
    """Prompt embeddings (B, T, D) of three prompts."""
    return torch.randn(SAMPLES, TEXT, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predicted(transformer: QwenImageTransformer2DModel, embeds: torch.Tensor) -> torch.Tensor:
    """The velocities (B, N, C) of the same latents for each prompt."""
    latents = torch.randn(1, GRID[0] * GRID[1], 64, generator=torch.Generator().manual_seed(1)).repeat(len(embeds), 1, 1)
    return transformer(
        hidden_states=latents,
        timestep=torch.full((len(embeds),), 0.6),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, *GRID)]] * len(embeds),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("fused", [True, False])
def test_each_sample_of_a_batch_has_its_own_adapters(fused, transformer, embeds):
    transformer.set_adapters([ADAPTER, EXTRA_ADAPTER], weights=[0.7, 1.6])
    gate = TokenGate(transformer)
    for adapter in (ADAPTER, EXTRA_ADAPTER):
        gate.install(transformer, adapter, fused)
    every = predicted(transformer, embeds)  # the gate knows none of these prompts
    with without_lora(transformer):
        base = predicted(transformer, embeds)
    assert not any(torch.equal(*pair) for pair in zip(every, base, strict=True))

    idle = [(ADAPTER, EXTRA_ADAPTER), (EXTRA_ADAPTER,), ()]
    for sample, adapters in zip(embeds, idle, strict=True):
        gate.remember(sample, adapters)
    found = predicted(transformer, embeds)
    assert torch.equal(found[0], base[0])
    transformer.set_adapters([ADAPTER], weights=[0.7])
    torch.testing.assert_close(found[1], predicted(transformer, embeds)[1], rtol=1e-5, atol=1e-5)
    transformer.set_adapters([ADAPTER, EXTRA_ADAPTER], weights=[0.7, 1.6])
    torch.testing.assert_close(found[2], every[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], every[1], atol=1e-3)

    padded = torch.cat([embeds, torch.zeros(SAMPLES, 2, 32)], dim=1)  # as in a batch with a longer prompt
    assert not torch.equal(predicted(transformer, padded)[0], predicted(transformer, padded + 1)[0])
    with without_lora(transformer):
        expected = predicted(transformer, padded)[0]
    assert torch.equal(predicted(transformer, padded)[0], expected)

    gate.on = False
    assert torch.equal(predicted(transformer, embeds), every)
    gate.on = True
    assert torch.equal(predicted(transformer, embeds), found)
    gate.remove()
    assert torch.equal(predicted(transformer, embeds), every)
    transformer.unload_lora()
    assert torch.equal(predicted(transformer, embeds), base)


def test_what_is_remembered_last_counts_and_the_oldest_prompts_are_forgotten(transformer, embeds, monkeypatch):
    gate = TokenGate(transformer)
    gate.install(transformer, ADAPTER, True)
    transformer.set_adapters([ADAPTER])
    every = predicted(transformer, embeds[:1])
    gate.remember(embeds[0], (ADAPTER,))
    assert not torch.equal(predicted(transformer, embeds[:1]), every)
    gate.remember(embeds[0], ())  # the same words, with an archive whose token they name
    assert torch.equal(predicted(transformer, embeds[:1]), every)
    monkeypatch.setattr("placeholder.lora.gate.PROMPTS_KEPT", 2)
    for number in range(5):
        gate.remember(embeds[1] + number, (ADAPTER,))
        assert len(gate._idle) <= 2
    for sample, adapters in ((embeds[1] + 4, ()), (embeds[0], (ADAPTER,)), (embeds[1] + 4, ())):
        gate.remember(sample, adapters)  # the last is known, and takes nobody's place
    assert not torch.equal(predicted(transformer, embeds[:1]), every)


def test_after_sampling_a_training_goes_on_as_before(base, embeds):
    transformer = load_transformer(base)
    load_lora(transformer, random_lora(4, seed=1))
    with pytest.raises(KeyError), gated(transformer) as gate:
        gate.remember(embeds[0], (ADAPTER,))
        inside = predicted(transformer, embeds[:1])
        raise KeyError
    layers = [module for module in transformer.modules() if hasattr(module, "lora_variant")]
    assert layers
    assert all(type(layer.lora_variant[ADAPTER]) is FusedLoraAddition for layer in layers)
    assert not transformer._forward_pre_hooks
    assert not torch.equal(predicted(transformer, embeds[:1]), inside)

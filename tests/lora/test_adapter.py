"""LoRA adapters on the transformer: what is trained, what is stored, what comes back, and what is refused."""

import math

import pytest
import torch

from placeholder.lora.adapter import ADAPTER, A, B, add_lora, load_lora, lora_metadata, lora_state_dict
from placeholder.model.loading import load_transformer
from placeholder.training.losses import Denoiser

MODULES = [
    f"transformer_blocks.{block}.attn.{name}"
    for block in range(2)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, embeds = torch.randn(1, 16, 64, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return Denoiser(transformer)(noisy, torch.full((1,), 0.5), embeds, (4, 4))


def random_lora(rank: int = 4, seed: int = 0, modules: list[str] = MODULES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        state[module + A] = torch.randn(rank, 64, generator=generator) * 0.2
        state[module + B] = torch.randn(64, rank, generator=generator) * 0.2
    return state


@pytest.fixture
def transformer(base):
    return load_transformer(base)


def test_only_the_lora_of_the_attention_layers_is_trained(transformer):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    parameters = add_lora(transformer, rank=4, seed=0)
    learning = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert learning == {f"{module}.{part}.default.weight" for module in MODULES for part in ("lora_A", "lora_B")}
    assert {id(parameter) for parameter in parameters} == {
        id(parameter) for parameter in transformer.parameters() if parameter.requires_grad
    }
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_fresh_lora_changes_nothing_and_starts_with_a_normal_a_and_b_at_zero(transformer):
    plain = velocity(transformer)
    add_lora(transformer, rank=16, seed=0)
    assert torch.equal(velocity(transformer), plain)
    for name, value in transformer.named_parameters():
        if value.requires_grad and "lora_B" in name:
            assert not value.any()
        elif value.requires_grad:
            assert value.std().item() == pytest.approx(1 / 16, rel=0.15)


def test_the_seed_decides_how_a_lora_starts_and_leaves_the_global_generator_alone(base):
    def started(seed: int) -> torch.Tensor:
        return add_lora(load_transformer(base), rank=4, seed=seed)[0].detach()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = started(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, started(0))
    assert not torch.equal(first, started(1))


def test_a_stored_lora_comes_back_whole(transformer, base):
    add_lora(transformer, rank=4, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in transformer.parameters() if p.requires_grad):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
            parameter.copy_(parameter.bfloat16())  # what is stored
    stored = lora_state_dict(transformer)
    assert set(stored) == {module + part for module in MODULES for part in (A, B)}
    assert all(value.dtype == torch.bfloat16 for value in stored.values())
    assert lora_metadata(transformer)["lora_alpha"] == lora_metadata(transformer)["r"] == 4
    fresh = load_transformer(base)
    plain = velocity(fresh)
    load_lora(fresh, stored)
    assert torch.equal(velocity(fresh), velocity(transformer))
    assert not torch.equal(velocity(fresh), plain)
    fresh.unload_lora()
    assert torch.equal(velocity(fresh), plain)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_the_scale_is_the_strength_and_zero_is_the_base_model_bit_for_bit(scale, base, transformer):
    state, plain = random_lora(), velocity(transformer)
    load_lora(transformer, state)
    transformer.set_adapters(ADAPTER, weights=scale)
    assert torch.equal(velocity(transformer), plain) == (scale == 0)
    merged = load_transformer(base)
    with torch.no_grad():
        for module in MODULES:
            merged.get_submodule(module).weight += scale * state[module + B] @ state[module + A]
    torch.testing.assert_close(velocity(transformer), velocity(merged), rtol=1e-4, atol=1e-5)


FIRST = MODULES[0]


GOOD = random_lora()
OTHER = "the LoRA does not fit.*"
WRONG = {
    "empty": ({}, "the LoRA holds no weights"),
    "name": (random_lora(modules=["blocks.0.to_q"]), f"{OTHER}: this base model has no linear layer 'blocks.0.to_q'"),
    "no linear": (random_lora(modules=["transformer_blocks.0.attn"]), f"{OTHER}: this base model has no linear layer"),
    "width in": (GOOD | {FIRST + A: torch.zeros(4, 65)}, rf"{OTHER}: '{FIRST}' has lora_A \(4, 65\)"),
    "width out": (GOOD | {FIRST + B: torch.zeros(65, 4)}, rf"{OTHER}: .* expected \(r, 64\) and \(64, r\)"),
    "two ranks": (GOOD | {FIRST + A: torch.zeros(8, 64)}, rf"{OTHER}: '{FIRST}' has lora_A \(8, 64\)"),
    "no matrix": (GOOD | {FIRST + A: torch.zeros(64)}, OTHER),
    "no A": ({key: value for key, value in GOOD.items() if key != FIRST + A}, f"'{FIRST}' needs both lora_A and lora_B"),
    "no B": ({key: value for key, value in GOOD.items() if key != FIRST + B}, f"'{FIRST}' needs both lora_A and lora_B"),
    "NaN": (GOOD | {FIRST + B: torch.full((64, 4), math.nan)}, f"NaN or infinite numbers in '{FIRST}{B}': it is damaged"),
    "rank": (GOOD | {FIRST + A: torch.zeros(2049, 64), FIRST + B: torch.zeros(64, 2049)}, "has rank 2049 .* at most 2048"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_lora_that_cannot_be_applied_whole_is_refused_and_leaves_the_base_model(kind, transformer):
    (state, sentence), plain = WRONG[kind], velocity(transformer)
    with pytest.raises(ValueError, match=sentence):
        load_lora(transformer, state)
    assert torch.equal(velocity(transformer), plain)


def test_a_lora_of_some_layers_and_of_different_ranks_loads(transformer):
    state = random_lora(modules=MODULES[:3]) | random_lora(rank=2, modules=MODULES[5:6])
    plain = velocity(transformer)
    load_lora(transformer, state)
    assert not torch.equal(velocity(transformer), plain)

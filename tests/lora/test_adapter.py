"""LoRA on the transformer: what learns, what is stored, what comes back, and what is refused."""

import json
import math

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import save_file

from placeholder.lora.adapter import (
    A,
    B,
    add_lora,
    fold_scale,
    load_lora,
    lora_metadata,
    lora_state_dict,
    scale_lora,
    unload_lora,
)
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


def test_only_the_lora_of_the_attention_layers_learns(transformer):
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


def test_a_fresh_lora_changes_nothing(transformer):
    plain = velocity(transformer)
    add_lora(transformer, rank=4, seed=0)
    assert torch.equal(velocity(transformer), plain)


def test_a_starts_normal_with_deviation_one_over_rank_and_b_at_zero(transformer):
    add_lora(transformer, rank=16, seed=0)
    state = {name: value for name, value in transformer.named_parameters() if value.requires_grad}
    for name, value in state.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(1 / 16, rel=0.15)


def test_the_seed_decides_how_the_lora_starts_and_leaves_other_random_numbers_alone(base):
    def started(seed: int) -> torch.Tensor:
        return add_lora(load_transformer(base), rank=4, seed=seed)[0].detach()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = started(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, started(0))
    assert not torch.equal(first, started(1))


def test_the_lora_learns_in_fp32_on_a_bf16_base(base, transformer):
    parameters = add_lora(transformer.bfloat16(), rank=4, seed=0)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)


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
    unload_lora(fresh)
    assert torch.equal(velocity(fresh), plain)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_the_scale_is_the_strength_of_the_loras_product(scale, base, transformer):
    state = random_lora()
    load_lora(transformer, state)
    scale_lora(transformer, scale)
    merged = load_transformer(base)
    with torch.no_grad():
        for module in MODULES:
            merged.get_submodule(module).weight += scale * state[module + B] @ state[module + A]
    torch.testing.assert_close(velocity(transformer), velocity(merged), rtol=1e-4, atol=1e-5)


def test_a_lora_at_scale_zero_is_the_base_model_bit_for_bit(transformer):
    plain = velocity(transformer)
    load_lora(transformer, random_lora())
    scale_lora(transformer, 0.0)
    assert torch.equal(velocity(transformer), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 8},
        {"lora_alpha": 1.0},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 16, "to_k": 2}},
        {"lora_alpha": 4, "alpha_pattern": {"^transformer_blocks.0.attn.to_v": 12}},
    ],
)
def test_a_lora_with_another_alpha_has_the_strength_that_stock_diffusers_gives_it(settings, base, transformer, tmp_path):
    state = random_lora()
    metadata = {"r": 4, "target_modules": MODULES, **settings}
    header = {f"transformer.{name}": value for name, value in metadata.items()}
    file = tmp_path / "lora.safetensors"
    save_file(
        {f"transformer.{key}": value for key, value in state.items()}, file, {"lora_adapter_metadata": json.dumps(header)}
    )
    stock = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=load_transformer(base))
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    plain = velocity(transformer)
    load_lora(transformer, fold_scale(state, metadata))
    torch.testing.assert_close(velocity(transformer), velocity(stock.transformer), rtol=1e-4, atol=1e-5)
    assert (velocity(transformer) - plain).abs().max() > 0.01


def test_without_metadata_alpha_equals_the_rank():
    state = random_lora()
    assert all(torch.equal(fold_scale(state, {})[key], value) for key, value in state.items())


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias", "modules_to_save"])
def test_other_methods_than_plain_lora_get_their_sentence(setting):
    with pytest.raises(ValueError, match=f"the LoRA was trained with {setting}: only plain LoRA can be loaded"):
        fold_scale(random_lora(), {setting: True})


def test_a_key_of_another_method_gets_its_sentence():
    with pytest.raises(
        ValueError, match=r"the LoRA holds an unknown key 'x\.alpha': expected names that end in \.lora_A\.weight"
    ):
        fold_scale({"x.alpha": torch.tensor(4.0)}, {})


FIRST = MODULES[0]


def wrong_loras() -> list:
    """LoRAs that cannot be loaded, and what is said about each."""
    good = random_lora()
    other = "the LoRA was made for another model"
    return [
        pytest.param({}, "the LoRA holds no weights", id="empty"),
        pytest.param(
            random_lora(modules=["blocks.0.to_q"]), f"{other}: this one has no linear layer 'blocks.0.to_q'", id="name"
        ),
        pytest.param(
            random_lora(modules=["transformer_blocks.0.attn"]), f"{other}: this one has no linear layer", id="no linear"
        ),
        pytest.param(good | {FIRST + A: torch.zeros(4, 65)}, rf"{other}: '{FIRST}' has lora_A \(4, 65\)", id="width in"),
        pytest.param(good | {FIRST + B: torch.zeros(65, 4)}, rf"{other}: .* expected \(r, 64\) and \(64, r\)", id="width out"),
        pytest.param(good | {FIRST + A: torch.zeros(8, 64)}, rf"{other}: '{FIRST}' has lora_A \(8, 64\)", id="two ranks"),
        pytest.param(good | {FIRST + A: torch.zeros(64)}, other, id="one dimension"),
        pytest.param(good | {FIRST + A: torch.tensor(1.0)}, other, id="no dimension"),
        pytest.param(
            {k: v for k, v in good.items() if k != FIRST + A}, f"incomplete: '{FIRST}' needs both lora_A and lora_B", id="A"
        ),
        pytest.param(
            {k: v for k, v in good.items() if k != FIRST + B}, f"incomplete: '{FIRST}' needs both lora_A and lora_B", id="B"
        ),
        pytest.param(
            good | {FIRST + B: torch.full((64, 4), math.nan)}, f"NaN or infinite numbers in '{FIRST}{B}': train it", id="NaN"
        ),
        pytest.param(
            good | {FIRST + A: torch.zeros(2049, 64), FIRST + B: torch.zeros(64, 2049)},
            f"the LoRA has rank 2049 at '{FIRST}': at most 2048 can be loaded",
            id="rank",
        ),
        pytest.param(good | {FIRST + A: torch.full((4, 64), math.inf)}, "NaN or infinite numbers", id="infinite"),
    ]


@pytest.mark.parametrize(("state", "sentence"), wrong_loras())
def test_a_lora_that_cannot_be_applied_whole_gets_its_sentence_and_leaves_the_base_model(state, sentence, transformer):
    plain = velocity(transformer)
    with pytest.raises(ValueError, match=sentence):
        load_lora(transformer, state)
    assert torch.equal(velocity(transformer), plain)


def test_a_lora_of_some_layers_and_of_different_ranks_loads(transformer):
    state = random_lora(modules=MODULES[:3]) | random_lora(rank=2, modules=MODULES[5:6])
    plain = velocity(transformer)
    load_lora(transformer, state)
    assert not torch.equal(velocity(transformer), plain)


def test_norms_compute_in_their_inputs_dtype_under_autocast(base):
    """CUDA's autocast would make them fp32, and with them all that follows until the next matrix product."""
    transformer = load_transformer(base).to(torch.bfloat16)
    add_lora(transformer, 4, seed=0)
    norm = transformer.transformer_blocks[0].img_norm1
    states = []
    norm.register_forward_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    inside = []
    original = torch.nn.functional.layer_norm

    def layer_norm(*given, **named):
        inside.append(torch.is_autocast_enabled("cpu"))
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patched, torch.autocast("cpu", dtype=torch.bfloat16):
        patched.setattr(torch.nn.functional, "layer_norm", layer_norm)
        found = norm(torch.randn(2, 64, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and inside == [False] and states == [True]

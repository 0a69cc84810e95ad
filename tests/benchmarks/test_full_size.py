"""The benchmark of the full-size model, run on a tiny one: on a GPU it has to work at the first try."""

import torch
from diffusers import QwenImageTransformer2DModel

from benchmarks.full_size import FULL_TEXT_ENCODER, RandomBase, run
from placeholder.transformer import compile as compilation

TINY = {
    "vae": {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1},
    "transformer": {
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    },
    "text_encoder": {
        "text_config": FULL_TEXT_ENCODER
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": FULL_TEXT_ENCODER["rope_parameters"] | {"mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    },
}


def test_both_trainings_and_the_prediction_run_in_bf16_and_are_timed(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traced and not compiled, which takes a tenth of the time
    base = RandomBase("tiny, random", torch.device("cpu"), torch.bfloat16, TINY)
    *_, found = run(base, side=64, training_steps=8, drawing_steps=8, cards=(1,))
    for mode in ("zero_prior", "baseline"):
        assert 0 < found[mode]["loss"] < 10
        assert found[mode]["median_step_seconds"] > 0
    assert found["prediction"]["size"] == (64, 64)
    assert list(found["prediction"]["median_step_seconds"]) == ["off", "on, both prompts named", "on"]
    assert all(seconds > 0 for seconds in found["prediction"]["median_step_seconds"].values())
    assert [card["transformer_storage"] for card in found["card of 1 GB"]] == ["none", "int8"] * 2
    assert all(0 < card["expected_peak_gb"] < 0.9 for card in found["card of 1 GB"])


def test_the_weights_are_noise_of_their_name_and_never_zeros():
    base = RandomBase("tiny, random", torch.device("cpu"), torch.bfloat16, TINY)
    first, again = (base.component(QwenImageTransformer2DModel, "transformer", dtype=torch.bfloat16) for _ in range(2))
    for (name, value), other in zip(first.named_parameters(), again.parameters(), strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, other)
        if value.ndim > 1:
            assert value.float().std().item() > 0.01, name

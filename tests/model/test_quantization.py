"""Quantized weights: the bytes they take, which layers have them, and that the models compute nearly the same."""

import bitsandbytes.nn
import pytest
import torch

from placeholder.model.loading import load_text_encoder, load_transformer
from placeholder.model.quantization import quantized_bytes
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import encode_prompts, prompt_ids
from placeholder.training.losses import Denoiser
from placeholder.transformer.layers import Int8Linear

NO_TOKENS = PlaceholderTokens(151665, {}, 32)
LAYERS = {"none": torch.nn.Linear, "int8": Int8Linear, "nf4": bitsandbytes.nn.Linear4bit}


def real_bytes(module: torch.nn.Module) -> int:
    """Bytes of the module's parameters, and of what bitsandbytes keeps for them elsewhere."""
    total = 0
    for parameter in module.parameters():
        total += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.mark.parametrize("quantization", LAYERS)
def test_every_linear_layer_of_the_blocks_is_quantized_and_takes_the_bytes_counted(base, quantization):
    plain, found = load_transformer(base), load_transformer(base, quantization)
    assert real_bytes(found) == pytest.approx(quantized_bytes(plain, plain.transformer_blocks, quantization), rel=0.02)
    layers = [module for module in found.transformer_blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 2 * 14 and {type(layer) for layer in layers} == {LAYERS[quantization]}
    assert {type(layer) for layer in (found.img_in, found.proj_out)} == {torch.nn.Linear}
    assert layers[0].weight.device == base.device


@pytest.mark.parametrize(("quantization", "largest"), [("int8", 0.05), ("nf4", 0.2)])
def test_a_quantized_transformer_predicts_nearly_the_same(base, quantization, largest):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 16, 64, generator=generator), torch.full((1,), 0.5), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        expected, found = (Denoiser(load_transformer(base, kind))(*inputs, (4, 4)) for kind in ("none", quantization))
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < largest


def test_a_quantized_text_encoder_encodes_nearly_the_same(base, text_encoder, tokenizer):
    quantized = load_text_encoder(base, "int8")
    layers = [module for module in quantized.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {Int8Linear}
    ids = torch.tensor([prompt_ids(tokenizer, NO_TOKENS, "a photo of a cat")])
    with torch.no_grad():
        expected, found = (encode_prompts(encoder, NO_TOKENS, ids) for encoder in (text_encoder, quantized))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05

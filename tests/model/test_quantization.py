"""Weights in 8 and 4 bits: what they take, and that the transformer computes nearly the same with them."""

import bitsandbytes.nn
import pytest
import torch
from torchao.quantization import Int8Tensor

from placeholder.model.loading import load_transformer
from placeholder.model.quantization import stored_bytes
from placeholder.transformer.checkpointing import storages


def real_bytes(module: torch.nn.Module) -> int:
    """Bytes of everything that the module's parameters consist of, scales included."""
    total = 0
    for parameter in module.parameters():
        total += sum(storage.nbytes() for storage in storages(parameter))
        if state := getattr(parameter, "quant_state", None):
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.mark.parametrize("storage", ["none", "int8", "nf4"])
def test_stored_weights_take_the_bytes_that_were_counted(base, storage):
    plain, stored = load_transformer(base), load_transformer(base, storage)
    assert real_bytes(stored) == pytest.approx(stored_bytes(plain, plain.transformer_blocks, storage), rel=0.02)
    assert stored.transformer_blocks[0].attn.to_q.weight.device == base.device


def test_every_linear_layer_of_the_blocks_is_stored(base):
    int8, nf4 = (
        [layer for layer in load_transformer(base, storage).transformer_blocks.modules() if isinstance(layer, torch.nn.Linear)]
        for storage in ("int8", "nf4")
    )
    assert len(int8) == len(nf4) == 2 * 14
    assert all(isinstance(layer.weight, Int8Tensor) and layer.weight.qdata.dtype == torch.int8 for layer in int8)
    assert all(isinstance(layer.weight, bitsandbytes.nn.Params4bit) and layer.weight.quant_type == "nf4" for layer in nf4)


@pytest.mark.parametrize(("storage", "largest"), [("int8", 0.05), ("nf4", 0.2)])
def test_a_stored_transformer_predicts_nearly_the_same(base, storage, largest):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 16, 64, generator=generator), torch.full((1,), 0.5), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        expected, found = (Denoiser(load_transformer(base, kind))(*inputs, (4, 4)) for kind in ("none", storage))
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < largest

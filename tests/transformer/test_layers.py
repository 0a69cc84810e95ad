"""Layers while a LoRA is trained: the numbers of PEFT's and diffusers' own, with less kept for the backward pass."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora.layer import LoraLayer

from placeholder.lora.adapter import ADAPTER, add_lora, without_lora
from placeholder.model.quantization import store
from placeholder.transformer.checkpointing import saved_bytes
from placeholder.transformer.layers import prepare_layers
from standin.small_base import TINY_SIZE, new_components


@pytest.fixture
def layer() -> LoraLayer:
    """One LoRA layer of a transformer, with B drawn instead of zero and a scale other than one."""
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False)
    add_lora(transformer, 4, seed=0)
    found = transformer.transformer_blocks[0].attn.to_q
    torch.nn.init.normal_(found.lora_B[ADAPTER].weight)
    found.scaling[ADAPTER] = 0.5
    return found


def drawn(layer: LoraLayer, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()


def values(layer: LoraLayer, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, A and B."""
    result = layer(x)
    learned = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return [result, *torch.autograd.grad(result.square().sum(), [x, *learned])]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3)])
def test_the_lora_is_added_as_peft_adds_it(layer, shape):
    x = drawn(layer, *shape)
    ours = values(layer, x)
    del layer.lora_variant[ADAPTER]
    for found, expected in zip(ours, values(layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_output_is_that_of_the_base_layer_and_gradients_are_fp32(layer):
    layer.base_layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, in_x, *in_lora = values(layer, drawn(layer, 1, 5).to(torch.bfloat16))
    assert result.dtype == in_x.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in in_lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_8_bits_computes_as_torchao_has_it_and_keeps_nothing_unpacked(dtype):
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False).to(dtype)
    store(transformer.transformer_blocks, "int8", dtype, torch.device("cpu"))
    layer = transformer.transformer_blocks[0].img_mlp.net[2]
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()

    def values() -> tuple[torch.Tensor, torch.Tensor, int]:
        result = layer(x)
        return result, *torch.autograd.grad(result.square().sum(), x), saved_bytes(lambda: layer(x), [x, layer.weight])

    expected, gradient, unpacked = values()
    prepare_layers(transformer, ADAPTER)
    found, same, kept = values()
    assert torch.equal(found, expected) and torch.equal(same, gradient)
    assert unpacked >= layer.weight.numel() * dtype.itemsize and kept == 0


def test_a_layer_in_8_bits_computes_in_autocasts_dtype():
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False)
    store(transformer.transformer_blocks, "int8", torch.float32, torch.device("cpu"))
    prepare_layers(transformer, ADAPTER)
    layer = transformer.transformer_blocks[0].img_mlp.net[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(1, layer.in_features)).dtype == torch.bfloat16


def test_with_the_lora_off_only_the_base_layer_computes():
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False)
    add_lora(transformer, 4, seed=0)
    layer = transformer.transformer_blocks[0].attn.to_q
    torch.nn.init.normal_(layer.lora_B[ADAPTER].weight)
    x = drawn(layer, 1, 5)
    with without_lora(transformer):
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))


def norm_values(norm: RMSNorm, x: torch.Tensor) -> list[torch.Tensor]:
    result = norm(x)
    weighted = (result.float() * torch.arange(x.shape[-1])).sum()
    return [result, *torch.autograd.grad(weighted, [x])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_rms_norm_is_diffusers_and_keeps_its_input_alone(dtype, tolerance):
    norm = RMSNorm(64, eps=1e-6).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    x = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    expected, kept = norm_values(norm, x), saved_bytes(lambda: norm(x), norm.parameters())
    prepare_layers(norm, ADAPTER)
    for found, wanted in zip(norm_values(norm, x), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() < tolerance * wanted.norm()
    rows = 2 * 3 * 4
    ours = saved_bytes(lambda: norm(x), norm.parameters())
    assert ours == x.nbytes + rows * 4 and ours <= kept * (1 if dtype == torch.float32 else 0.4)


def test_a_row_of_zeros_has_a_norm_and_a_gradient():
    norm = RMSNorm(8, eps=1e-6).requires_grad_(False)
    prepare_layers(norm, ADAPTER)
    result, gradient = norm_values(norm, torch.zeros(1, 8, requires_grad=True))
    assert torch.equal(result, torch.zeros(1, 8)) and torch.isfinite(gradient).all()

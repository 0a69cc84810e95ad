"""Layers in training: the numbers of PEFT's and diffusers' own, with less kept for the backward pass."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora.layer import LoraLayer

from benchmarks.flops import flop_counter
from placeholder.lora.adapter import ADAPTER, add_lora
from placeholder.training.losses import Denoiser
from placeholder.transformer import layers
from placeholder.transformer.checkpointing import BlockCheckpointing, saved_bytes
from placeholder.transformer.layers import Int8Linear, prepare_layers
from standin.small_base import TINY_SIZE, new_components


@pytest.fixture
def transformer() -> torch.nn.Module:
    """A small transformer with a LoRA."""
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False)
    add_lora(transformer, 4, seed=0)
    return transformer


@pytest.fixture
def layer(transformer) -> LoraLayer:
    """One of its LoRA layers, with a random B instead of zero."""
    found = transformer.transformer_blocks[0].attn.to_q
    torch.nn.init.normal_(found.lora_B[ADAPTER].weight)
    return found


def random_input(layer: LoraLayer, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()


def values(layer: LoraLayer, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, A and B."""
    result = layer(x)
    learned = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return [result, *torch.autograd.grad(result.square().sum(), [x, *learned])]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3)])
def test_the_lora_is_added_as_peft_adds_it(layer, shape, scale):
    layer.scaling[ADAPTER] = scale
    x = random_input(layer, *shape)
    ours = values(layer, x)
    assert (type(ours[0].grad_fn).__name__ == "_LoraLinearBackward") == (scale == 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ours[0], rtol=1e-4, atol=1e-5)
    del layer.lora_variant[ADAPTER]
    for found, expected in zip(ours, values(layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_input_needs_no_gradient_computes_none(layer):
    x, flops = random_input(layer, 1, 5), []
    for given in (x, x.detach()):
        with flop_counter() as counted:
            layer(given).sum().backward()
        flops.append(counted.get_total_flops())
    assert flops[0] - flops[1] == 2 * 5 * layer.in_features * (layer.out_features + layer.r[ADAPTER])


def test_under_autocast_the_output_is_bf16_and_gradients_are_fp32(layer):
    layer.base_layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, in_x, *in_lora = values(layer, random_input(layer, 1, 5).to(torch.bfloat16))
    assert result.dtype == in_x.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in in_lora)


def bf16_steps(together: bool, checkpointed: int = 0) -> list[torch.Tensor]:
    """The gradients of two passes through a bf16 transformer between which its LoRA changes."""
    transformer = new_components(TINY_SIZE, seed=0)["transformer"].requires_grad_(False).bfloat16()
    lora = add_lora(transformer, 4, seed=0)
    assert len(transformer._forward_pre_hooks) == 1
    if not together:
        transformer._forward_pre_hooks.clear()
    BlockCheckpointing(transformer, checkpointed)
    generator = torch.Generator().manual_seed(1)
    noisy, embeds = torch.randn(2, 16, 64, generator=generator), torch.randn(2, 7, TINY_SIZE.text_width, generator=generator)
    gradients = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in lora:
                parameter.normal_(std=0.1, generator=generator)
        Denoiser(transformer)(noisy, torch.full((2,), 0.5), embeds, (4, 4)).float().square().mean().backward()
        gradients += [parameter.grad.clone() for parameter in lora if parameter.grad is not None]  # the second are sums
    return gradients


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_weights_that_are_cast_together_learn_as_with_autocast_bit_for_bit(checkpointed):
    found, expected = bf16_steps(True, checkpointed), bf16_steps(False)
    assert len(found) == len(expected) > 50 and {gradient.dtype for gradient in found} == {torch.float32}
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_weights_and_gradients_are_cast_block_by_block(monkeypatch):
    """The fp32 copies of all gradients at once would be as large as the LoRA."""
    made, copies = [], layers._copies
    monkeypatch.setattr(layers, "_copies", lambda tensors, dtype: made.append(len(tensors)) or copies(tensors, dtype))
    bf16_steps(True)
    assert made == 2 * [16, 16, 14, 16]  # eight layers a block; nothing reads what the last one's to_add_out gives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_layer_computes_with_rounded_weights_and_keeps_only_these(dtype):
    generator = torch.Generator().manual_seed(1)
    plain = torch.nn.Linear(64, 24).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(plain.weight, generator=generator)
    plain.weight[3] = 0.0
    layer = Int8Linear(plain)
    weight = layer.weight * layer.scale
    rounding = torch.finfo(dtype).eps / 2 * plain.weight.abs().max()  # of the product, beside that of the number
    assert (weight - plain.weight).abs().max() <= 0.51 * layer.scale.max() + rounding
    x = torch.randn(2, 7, 64, generator=generator).to(dtype).requires_grad_()
    expected, found = torch.nn.functional.linear(x, weight, plain.bias), layer(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad(result.float().sum(), x)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)
    assert saved_bytes(lambda: layer(x), [x, layer.weight, layer.scale]) == 0


def test_an_int8_layer_computes_in_autocasts_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Int8Linear(torch.nn.Linear(8, 8))(torch.ones(1, 8)).dtype == torch.bfloat16


def test_a_layer_norm_computes_in_its_inputs_dtype_under_autocast(monkeypatch):
    """CUDA's autocast would make it fp32, and with it all that follows until the next matrix product."""
    norm, inside = torch.nn.LayerNorm(64).bfloat16(), []
    prepare_layers(torch.nn.Sequential(norm), ADAPTER)
    layer_norm = torch.nn.functional.layer_norm

    def watched(*given, **named):
        inside.append(torch.is_autocast_enabled("cpu"))
        return layer_norm(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert inside == [False]


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

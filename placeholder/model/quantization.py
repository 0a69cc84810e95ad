"""Quantization of a frozen model's linear layers: int8 or nf4 weights, computation in the model's own dtype.

In place, and not by a `quantization_config` for `from_pretrained`: diffusers refuses bitsandbytes without a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from placeholder.transformer.layers import Int8Linear

Quantization = Literal["none", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)  # the largest first
NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default
NF4_SCALE_BLOCK = 256  # scales that share a scale of their own, its "double quantization"


def quantize(module: nn.Module, quantization: Quantization, device: torch.device) -> None:
    """Replace every linear layer of `module`, which is on the CPU, by one quantized on the device, one after the other."""
    if quantization == "none":
        return
    replacement: Callable[[nn.Linear], nn.Linear] = Int8Linear if quantization == "int8" else _nf4_linear
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, replacement(layer.to(device)).to(device))


def _nf4_linear(layer: nn.Linear) -> nn.Linear:
    """4-bit normal floats with a scale for each 64 weights (QLoRA, arXiv:2305.14314); quantized when moved to a device."""
    import bitsandbytes.nn as bnb

    shape = layer.in_features, layer.out_features, layer.bias is not None
    quantized = bnb.Linear4bit(*shape, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
    quantized.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    quantized.bias = layer.bias
    quantized.support_avx512bf16_for_cpu = False  # that path repacks weights in place, for widths of 64 n alone
    return quantized


def quantized_bytes(module: nn.Module, part: nn.Module, quantization: Quantization) -> int:
    """Bytes of the module's parameters, on any device, once the linear layers of its `part` are quantized."""
    return sum(parameter.nbytes for parameter in module.parameters()) + sum(
        _bytes(layer.weight, quantization) - layer.weight.nbytes for layer in _linear_layers(part)
    )


def dequantized_bytes(part: nn.Module, quantization: Quantization) -> int:
    """Bytes of the largest linear layer's weight, which is dequantized while it computes; 0 without quantization."""
    return 0 if quantization == "none" else max(layer.weight.nbytes for layer in _linear_layers(part))


def _bytes(weight: Tensor, quantization: Quantization) -> int:
    count = weight.numel()
    if quantization == "int8":
        return count + len(weight) * weight.itemsize
    if quantization == "nf4":
        scales = -(-count // NF4_BLOCK)
        return -(-count // 2) + scales + -(-scales // NF4_SCALE_BLOCK) * torch.float32.itemsize
    return weight.nbytes


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The base model's linear layers; a LoRA's own are not quantized."""
    return (layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and "lora_" not in name)

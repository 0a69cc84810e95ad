"""How a frozen model's weights are stored: as they are, in 8 bits, or in 4; it computes in its own dtype all the same."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

Storage = Literal["none", "int8", "nf4"]
STORAGES: tuple[Storage, ...] = ("none", "int8", "nf4")  # the largest first
NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default
NF4_SCALE_BLOCK = 256  # scales that share a scale of their own, its "double quantization"


def store(module: nn.Module, storage: Storage, dtype: torch.dtype, device: torch.device) -> None:
    """Store the weight of every linear layer of `module`, which is on the CPU, in place and on the device.

    int8: a scale for each row (torchao). nf4: 4-bit normal floats with a scale for each 64, as QLoRA has them
    (arXiv:2305.14314; bitsandbytes).
    """
    if storage == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # imported where used: it takes seconds

        quantize_(module, Int8WeightOnlyConfig(), device=device)
    elif storage == "nf4":
        _store_nf4(module, dtype, device)


def _store_nf4(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    import bitsandbytes.nn

    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear:
                continue
            stored = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
            )
            stored.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            stored.bias = layer.bias
            stored.support_avx512bf16_for_cpu = (
                False  # its own way on some CPUs repacks weights in place, for widths of 64 n alone
            )
            setattr(parent, name, stored.to(device))


def stored_bytes(module: nn.Module, part: nn.Module, storage: Storage) -> int:
    """Bytes of the module's parameters, of whatever device, once the linear layers of its `part` are stored."""
    return sum(parameter.nbytes for parameter in module.parameters()) + sum(
        _bytes(layer.weight, storage) - layer.weight.nbytes for layer in _linear_layers(part)
    )


def _bytes(weight: Tensor, storage: Storage) -> int:
    count = weight.numel()
    if storage == "int8":
        return count + len(weight) * weight.itemsize
    if storage == "nf4":
        scales = -(-count // NF4_BLOCK)
        return -(-count // 2) + scales + -(-scales // NF4_SCALE_BLOCK) * torch.float32.itemsize
    return weight.nbytes


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that the base model has; a LoRA's own are not stored."""
    return (layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and "lora_" not in name)

"""How the transformer's layers compute with a LoRA on them, most of it in training: the same numbers up to rounding, with less kept and moved."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fuse_lora_addition(transformer: nn.Module, adapter: str) -> None:
    """Let the layers of an adapter without dropout add their LoRA as below. Its weights are read without calling its layers."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.lora_variant[adapter] = FusedLoraAddition()


def prepare_layers(transformer: nn.Module, adapter: str) -> None:
    """Let LoRA layers, layers in 8 bits and norms compute as below; for frozen norms and an adapter without dropout."""
    fuse_lora_addition(transformer, adapter)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast brings weight and input together; PEFT would keep an fp32 copy of each input for the backward pass.
            module.cast_input_dtype_enabled = False
        elif isinstance(module, nn.Linear) and is_traceable_wrapper_subclass(module.weight):  # torchao's, in 8 bits
            module.forward = MethodType(_int8_linear, module)
        elif type(module) is nn.LayerNorm:
            module.forward = MethodType(_layer_norm, module)
        elif type(module) is RMSNorm and module.weight is not None and module.bias is None:
            module.forward = MethodType(_rms_norm, module)


class FusedLoraAddition(LoraVariant):
    """The LoRA's part is added onto the base layer's output by the matrix product itself (addmm).

    PEFT's own forward pass writes it out, multiplies it by its scale and adds it: three more passes over a tensor as large as
    the output, and one more backwards.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **options: Any) -> None:
        """Nothing to set up."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """`result`, the base layer's output (..., O) for x (..., I), with scale * B A x added."""
        down = F.linear(x, module.lora_A[active_adapter].weight).flatten(0, -2)  # (N, r)
        up, scale = module.lora_B[active_adapter].weight.t(), module.scaling[active_adapter]
        return torch.addmm(result.flatten(0, -2), down, up, alpha=scale).view_as(result)


def _int8_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer with its weight unpacked for each use alone: torchao's own would keep it unpacked until the backward pass."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Int8Linear.apply(x, layer.weight.qdata, layer.weight.scale, layer.bias)


class _Int8Linear(torch.autograd.Function):
    """y = s (x Q^T) + b for a weight of int8 numbers Q (O, I) with a scale s for each row, which does not learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        y = F.linear(x, numbers.to(x.dtype)) * scale.to(x.dtype).flatten()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        numbers, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype).flatten()) @ numbers.to(gradient.dtype), None, None, None


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in its input's dtype, as in prediction: CUDA's autocast returns fp32, which then is kept beside every bf16 copy.

    The CUDA kernel accumulates in fp32 all the same.
    """
    if x.dtype == torch.float32:
        return nn.LayerNorm.forward(norm, x)
    with torch.autocast(x.device.type, enabled=False):
        return nn.LayerNorm.forward(norm, x)


def _rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm with its input alone kept for the backward pass; of one in bf16 diffusers' own keeps fp32 copies.

    CUDA has a kernel for it, and so has the compiler; the CPU's takes the norm apart again.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, norm.dim, norm.weight, norm.eps)
    return _RMSNorm.apply(x, norm.weight, norm.eps)


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), arXiv:1910.07467, equation 4, in fp32, for a weight that does not learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        gradient, normed = gradient.float() * weight, x * inverse
        along = (gradient * normed).mean(-1, keepdim=True)
        return (gradient - normed.mul_(along)).mul_(inverse).to(x.dtype), None, None

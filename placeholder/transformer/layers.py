"""Layers of the transformer that keep and move less in training than PEFT's and diffusers' own, equal up to rounding."""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INT8_MAX = 127
CAST = "lora_cast"  # of a LoRA layer: its A and B as `cast_together` has cast them for the present pass


def fuse_lora_addition(transformer: nn.Module, adapter: str) -> None:
    """Let FusedLoraAddition add an adapter without dropout. Its weights are read without calling its layers."""
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.lora_variant[adapter] = FusedLoraAddition()


def prepare_layers(transformer: nn.Module, adapter: str) -> None:
    """Let LoRA layers and norms compute as below, for frozen norms and an adapter without dropout."""
    fuse_lora_addition(transformer, adapter)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast brings weight and input together; PEFT would keep an fp32 copy of each input for the backward pass.
            module.cast_input_dtype_enabled = False
            if isinstance(module, LoraLayer) and type(module.get_base_layer()) is nn.Linear:
                module.forward = partial(_lora_linear, module, adapter)
        elif type(module) is nn.LayerNorm:
            module.forward = MethodType(_layer_norm, module)
        elif type(module) is RMSNorm and module.weight is not None and module.bias is None:
            module.forward = MethodType(_rms_norm, module)


class FusedLoraAddition(LoraVariant):
    """Adds the LoRA's output to the base layer's by one `addmm`.

    PEFT's own forward pass writes it out, scales it and adds it: three more passes over a tensor as large as the output, and
    one more in the backward pass.
    """

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """`result`, the base layer's output (..., O) for x (..., I), with scale * B A x added."""
        a, b = _lora_weights(module, active_adapter)
        down = F.linear(x, a).flatten(0, -2)  # (N, r)
        return torch.addmm(result.flatten(0, -2), down, b.t(), alpha=module.scaling[active_adapter]).view_as(result)


def _lora_linear(module: LoraLayer, adapter: str, x: Tensor) -> Tensor:
    """A linear layer with its LoRA, (..., I) => (..., O): one operation for autograd where there are gradients to be."""
    weight, variant = module.get_base_layer().weight, module.lora_variant.get(adapter)
    plain = type(variant) is FusedLoraAddition and module.scaling[adapter] == 1 and module.active_adapters == [adapter]
    if module.disable_adapters or not plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(module).forward(module, x)
    a, b = (part.to(weight.dtype) for part in _lora_weights(module, adapter))
    return _LoraLinear.apply(x.to(weight.dtype), weight, module.get_base_layer().bias, a, b)


def _lora_weights(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    return getattr(module, CAST, None) or (module.lora_A[adapter].weight, module.lora_B[adapter].weight)


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + B A x for a frozen W: what autograd would add up of four operations is added by the matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        y, down = F.linear(x, weight, bias), F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, down)
        y.flatten(0, -2).addmm_(down.flatten(0, -2), b.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, weight, a, b, down = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)  # (N, O)
        of_down = gradient @ b  # (N, r)
        of_x = (gradient @ weight).addmm_(of_down, a).view_as(x) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_down.t() @ x.flatten(0, -2), gradient.t() @ down.flatten(0, -2)


def cast_together(transformer: nn.Module, adapter: str, dtype: torch.dtype) -> None:
    """Cast the fp32 weights of an adapter to `dtype` before each pass, a block's together; FusedLoraAddition reads the casts.

    Autocast would launch a kernel for each of a LoRA's 960 weights in each pass, and for each of their gradients. In one
    operation for all blocks the fp32 copies of all gradients would be in memory at once.
    """
    blocks = [
        [module for module in block.modules() if isinstance(module, LoraLayer) and adapter in module.lora_A]
        for block in transformer.transformer_blocks
    ]

    def cast(*_: Any) -> None:
        for layers in blocks:
            weights = [part[adapter].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
            casts = _Cast.apply(dtype, *weights)
            for layer, *pair in zip(layers, casts[::2], casts[1::2], strict=True):
                setattr(layer, CAST, pair)

    transformer.register_forward_pre_hook(cast)


class _Cast(torch.autograd.Function):
    """Copies of tensors in another dtype, and back again of their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_copies(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class Int8Linear(nn.Linear):
    """A frozen linear layer with int8 weights (O, I) and a scale for each row, (O, 1) in the dtype of the layer it replaces.

    The weight is dequantized in each pass, and not kept for the backward pass.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min(torch.finfo(weight.dtype).tiny)
        numbers = (weight.float() / scale.float()).round().clamp(-INT8_MAX, INT8_MAX)
        self.weight = nn.Parameter(numbers.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) => (..., O), in the dtype of x, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8Product.apply(x, self.weight, self.scale, self.bias)


class _Int8Product(torch.autograd.Function):
    """y = s (x Q^T) + b for int8 numbers Q (O, I) with scales s (O, 1)."""

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
    """LayerNorm in its input's dtype, as in prediction; the CUDA kernel accumulates in fp32.

    CUDA's autocast returns fp32, which is then kept together with every bf16 copy.
    """
    if x.dtype == torch.float32:
        return nn.LayerNorm.forward(norm, x)
    with torch.autocast(x.device.type, enabled=False):
        return nn.LayerNorm.forward(norm, x)


def _rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm that keeps only its input for the backward pass; for bf16, diffusers' own keeps fp32 copies.

    CUDA and the compiler have a kernel for it; the CPU's is decomposed again.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, norm.dim, norm.weight, norm.eps)
    return _RMSNorm.apply(x, norm.weight, norm.eps)


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), arXiv:1910.07467, equation 4, in fp32, for a frozen weight."""

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

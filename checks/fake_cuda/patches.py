"""What of PyTorch is replaced while a card is pretended: torch.cuda's answers, the choice of attention, moving modules."""

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from checks.fake_cuda.card import Card, where

CONTEXT = 0.5e9  # bytes of CUDA's own context


@contextmanager
def fake_cuda(total: float = 80e9) -> Iterator[Card]:
    """Pretend that an H100 with so many bytes of memory is there."""
    card = Card(int(total))
    with ExitStack() as stack:
        for target, name, value in _replacements(card):
            stack.enter_context(patch.object(target, name, value, create=name == "_exchange_device"))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(card)
        yield card


def _replacements(card: Card) -> list[tuple]:
    properties = {"name": "NVIDIA H100 80GB HBM3", "total_memory": card.total, "major": 9, "minor": 0}
    stream = types.SimpleNamespace(
        wait_stream=lambda *_: None,
        wait_event=lambda *_: None,
        record_event=lambda *_: None,
        synchronize=lambda: card.waits.update([("stream", where())]),
        device=torch.device("cuda:0"),
        stream_id=0,
        cuda_stream=0,
    )

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        """What would be captured runs at once, and there is nothing to replay."""
        card.capturing = True
        try:
            yield
        finally:
            card.capturing = False

    def reset_peak(*_: object) -> None:
        card.peak = card.live

    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": properties["name"],
        "get_device_properties": types.SimpleNamespace(multi_processor_count=132, gcnArchName="", **properties),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "Stream": stream,
        "current_stream": stream,
        "_exchange_device": 0,
        "graph_pool_handle": (0, 0),
        "CUDAGraph": types.SimpleNamespace(replay=lambda: None),
        **dict.fromkeys(("_lazy_init", "set_device", "set_rng_state", "empty_cache", "set_per_process_memory_fraction")),
    }
    cuda = [(torch.cuda, name, lambda *_, answer=answer, **__: answer) for name, answer in answers.items()]
    cuda += [
        (torch.cuda, "mem_get_info", lambda *_: (card.total - card.live - int(CONTEXT), card.total)),
        (torch.cuda, "synchronize", lambda *_: card.waits.update([("synchronize", where())])),
        (torch.cuda, "reset_peak_memory_stats", reset_peak),
        (torch.cuda, "graph", graph),
        *((torch.cuda, name, lambda *_: card.live) for name in ("memory_reserved", "memory_allocated")),
        *((torch.cuda, name, lambda *_: card.peak) for name in ("max_memory_reserved", "max_memory_allocated")),
        *((torch.cuda, name, lambda *_, **__: nullcontext()) for name in ("stream", "device")),
    ]
    return [
        *cuda,
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensorMode, "avoid_device_init", property(lambda self: True)),
        (torch._C, "_ensureCUDADeviceGuardSet", lambda: None),
        (Tensor, "pin_memory", lambda self, *_, **__: self.clone()),
        (Tensor, "is_pinned", lambda self, *_: True),
        (Tensor, "record_stream", lambda *_: None),
        (nn.Module, "_apply", _apply),
        (nn.functional, "scaled_dot_product_attention", _attention(card)),
    ]


def _attention(card: Card) -> Callable[..., Tensor]:
    """What CUDA's own choice takes (torch's sdp_utils.cpp): a fused kernel without a mask in half precision, else another."""
    original = nn.functional.scaled_dot_product_attention

    def choose(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not card.has(query):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if len({query.dtype, key.dtype, value.dtype}) > 1:
            raise RuntimeError(f"attention on {query.dtype}, {key.dtype} and {value.dtype} at {where()}")
        heads, half = query.shape[1], query.dtype in (torch.bfloat16, torch.float16)
        if half and attn_mask is None:
            card.attention["fused", heads] += 1
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        card.attention["with a mask" if attn_mask is not None else "in fp32", heads] += 1
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
        bias = attn_mask
        if bias is not None:
            blank = torch.zeros_like(bias, dtype=query.dtype)
            bias = blank.masked_fill(bias.logical_not(), float("-inf")) if bias.dtype == torch.bool else bias
            bias = bias.expand(*query.shape[:3], key.shape[2])
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale)[0]

    return choose


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters, where torch would swap fake ones in place, which nothing else may refer to then."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        with torch.no_grad():
            applied = function(parameter)
        if FakeTensor in (type(applied), type(parameter.data)) or is_traceable_wrapper_subclass(applied):
            module._parameters[name] = nn.Parameter(applied, requires_grad=parameter.requires_grad)
        elif applied is not parameter:
            parameter.data = applied
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module

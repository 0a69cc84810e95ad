"""FLOPs of what runs inside, with attention on the CPU and products added in place, which PyTorch's counter does not know."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _added(_to: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b[1]


def _forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, _repeated(key, query), _repeated(value, query))


def _backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, _repeated(key, query), _repeated(value, query))


def _repeated(shape: torch.Size, query: torch.Size) -> torch.Size:
    """Keys or values (B, H, T, D) for each head of the query: torch 2.11's formulas do not know grouped-query attention."""
    return torch.Size((shape[0], query[1], *shape[2:]))


def flop_counter() -> FlopCounterMode:
    """A context in which matrix products, convolutions and attention are counted, forwards and backwards."""
    formulas = {
        aten.addmm_: _added,
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)

"""Faults that are put into a training on the pretended GPU, each of which checks/cuda.py has to find."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from placeholder.training import loop

HEADS = 24  # of the transformer's blocks


def _attention_with(**changed: Callable[[Tensor], Any]) -> Any:
    """The blocks' attention with an argument of scaled_dot_product_attention made from the query."""
    original = functional.scaled_dot_product_attention

    def faulty(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.shape[1] != HEADS:
            return original(query, key, value, *rest, **options)
        return original(
            **{"query": query, "key": key, "value": value} | options | {n: made(query) for n, made in changed.items()}
        )

    return patch.object(functional, "scaled_dot_product_attention", faulty)


def _mask(query: Tensor) -> Tensor:
    return torch.ones(query.shape[0], 1, 1, query.shape[2], dtype=torch.bool, device=query.device)


_losses = loop.flow_matching_losses


def _with_a_host_tensor(*arguments: Any) -> Tensor:  # the same function in each step: a graph is known by it
    return _losses(*arguments) * torch.tensor(0.5)  # with a dimension or without


IN_THE_STEP: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda loss: loss.item(),
    "blocking copy": lambda loss: torch.zeros(8).to(loss.device),
}
FAULTS: dict[str, Callable[[], Any]] = dict.fromkeys(IN_THE_STEP, nullcontext) | {
    "mask": lambda: _attention_with(attn_mask=_mask),
    "fp32": lambda: _attention_with(key=lambda query: query.float()),
    "host tensor in a graph": lambda: patch.object(loop, "flow_matching_losses", _with_a_host_tensor),
    "memory": lambda: patch.object(loop, "flow_matching_losses", _hoarding(loop.flow_matching_losses)),
}


def _hoarding(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept: list[Tensor] = []

    def losses(*arguments: Any) -> Tensor:
        kept.append(torch.empty(int(0.06 * torch.cuda.memory_allocated()), dtype=torch.uint8, device="cuda"))
        return original(*arguments)

    return losses


FINDINGS = {  # what has to be said of each fault, so that none is found by another check than its own
    "item": "no step waits for the GPU",
    "blocking copy": "copies to the GPU do not block",
    "mask": "the blocks' attention is fused",
    "fp32": "attention on torch.bfloat16, torch.float32",
    "host tensor in a graph": "no tensor of the host is captured",
    "memory": "GB of",
}

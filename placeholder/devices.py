"""Copies to the device that do not wait for what it is computing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From ordinary memory a copy would wait until the device has done all that it was given to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def stack_on(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype, of the CPU or of the device, as one (n, ...) on the device; see `to_device`."""
    first = tensors[0]
    if first.device.type == device.type:
        return torch.stack(tuple(tensors))
    stacked = torch.empty((len(tensors), *first.shape), dtype=first.dtype, pin_memory=device.type == "cuda")
    return torch.stack(tuple(tensors), out=stacked).to(device, non_blocking=True)

"""Copies to the device: what there is without one."""

import torch

from placeholder.devices import stack_on, to_device


def test_tensors_are_stacked_where_they_are_to_be():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(stack_on([ones, twos], cpu), torch.stack([ones, twos]))
    assert stack_on([ones, twos], meta).device == meta
    assert stack_on([ones.to(meta), twos.to(meta)], meta).shape == (2, 2, 3)
    assert stack_on([ones.bfloat16()], cpu).dtype == torch.bfloat16
    assert to_device(ones, meta).device == meta

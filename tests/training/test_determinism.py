"""Deterministic algorithms are asked for on a GPU, and only while a training runs."""

import os

import pytest
import torch

from placeholder.training.determinism import WORKSPACE, WORKSPACE_VARIABLE, StrictSteps, deterministic


def test_on_a_gpu_deterministic_algorithms_are_used_for_a_while(monkeypatch):
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    with pytest.raises(KeyError), deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[WORKSPACE_VARIABLE] == WORKSPACE
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_on_a_cpu_nothing_changes():
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def refused() -> torch.Tensor:
    """An operation that PyTorch has no deterministic algorithm for, on any device."""
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_steps_are_strict_until_pytorch_refuses_one():
    strict = StrictSteps()
    with deterministic(torch.device("cuda")):
        with pytest.raises(RuntimeError) as found, strict():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            refused()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.warns(UserWarning, match="the same seed may give other weights on this GPU: put_"):
            assert strict.gives_way(found.value)
        with pytest.warns(UserWarning), strict():
            refused()
        assert not strict.gives_way(found.value) and not StrictSteps().gives_way(RuntimeError("another error"))


def test_steps_on_a_cpu_are_not_strict():
    strict = StrictSteps()
    with strict():
        refused()
    assert not strict.gives_way(RuntimeError("put_ does not have a deterministic implementation"))

"""Deterministic algorithms are asked for on a GPU, and only while a training runs."""

import os

import pytest
import torch

from placeholder.determinism import WORKSPACE, WORKSPACE_VARIABLE, deterministic


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

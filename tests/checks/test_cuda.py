"""The CUDA path on the pretended GPU: the fast part passes, and each fault that is put in is found."""

import subprocess
import sys

import pytest

from demo.server import ROOT


def check(*arguments: str) -> subprocess.CompletedProcess:
    """The check as a process of its own, because it has to begin before torch."""
    command = [sys.executable, "-W", "ignore", "-m", "checks.cuda", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_training_with_a_token_neither_waits_nor_mixes_nor_takes_more_than_planned():
    found = check("--fast")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("ok   token: ") == 7


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("item", "FAIL token: no step waits for the GPU {('item', 'placeholder/training/loop.py:"),
        ("mask", "FAIL token: the blocks' attention is fused, without a mask {"),
    ],
)
def test_a_fault_is_found(fault, line):
    found = check("--fault", fault)
    assert found.returncode == 0 and line in found.stdout, found.stdout + found.stderr

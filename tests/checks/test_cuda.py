"""The CUDA path on the pretended GPU: the fast part passes, and a fault that is put in is found."""

import subprocess
import sys

from demo.server import ROOT


def test_a_training_neither_waits_nor_mixes_nor_takes_more_than_planned_and_a_fault_is_found():
    command = [sys.executable, "-W", "ignore", "-m", "checks.cuda", "--fast"]  # a process of its own: it begins before torch
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("ok   token: ") == 9 and found.stdout.count("ok   the fault ") == 1

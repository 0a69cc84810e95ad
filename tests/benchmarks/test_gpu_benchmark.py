"""The GPU benchmark's loops on a tiny transformer in bf16: on a GPU they have to work at the first try."""

import time
import warnings
from contextlib import contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu
from benchmarks.full_size import RandomBase
from placeholder.transformer import compile as compilation
from placeholder.transformer.compile import CompiledBlocks
from tests.benchmarks.test_full_size import TINY

ARMS = ["script, checkpointing", "script", gpu.EAGER, gpu.OURS]


@pytest.fixture(autouse=True)
def own_precision():
    """accelerate keeps the precision of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture
def wall_clock(monkeypatch):
    def milliseconds(step) -> float:
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)

    monkeypatch.setattr(gpu, "_milliseconds", milliseconds)


@pytest.fixture
def sync_debug_mode(monkeypatch) -> list[str]:
    """The modes that were set, where there is no CUDA to set them in."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


@pytest.fixture
def eager_blocks(monkeypatch) -> list[CompiledBlocks]:
    """Blocks that are traced and not compiled, which takes a tenth of the time."""
    made: list[CompiledBlocks] = []

    @contextmanager
    def compiled_blocks(model, _wanted, log):
        made.append(CompiledBlocks(model, log))
        yield
        made[-1].undo()

    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(gpu, "compiled_blocks", compiled_blocks)
    return made


def test_every_loop_trains_the_one_lora_and_stands_in_the_table(wall_clock, sync_debug_mode, eager_blocks):
    base = RandomBase("tiny, random", torch.device("cpu"), torch.bfloat16, TINY)
    (found,) = gpu.run(base, sides=(64,), lengths=(5,), warm_up=1, rounds=2)
    assert list(found["arms"]) == [*ARMS, gpu.COMPILED]
    assert all(len(arm["ms"]) == 2 and arm["median_ms"] > 0 and len(arm["warm_up_ms"]) == 1 for arm in found["arms"].values())
    assert all(any("attention" in name for name in each["attention_kernels"]) for each in found["profile"].values())
    lines = gpu.table([found]).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == [*ARMS, gpu.COMPILED]
    assert len(eager_blocks) == 1
    assert [line.split(" | ")[1] for line in gpu.profile_table([found]).splitlines()[2:]] == ["ours", gpu.COMPILED]


def test_a_loop_changes_the_lora_and_recomputes_only_where_it_says_so():
    base = RandomBase("tiny, random", torch.device("cpu"), torch.bfloat16, TINY)
    model = gpu.load_transformer(base)
    lora = gpu.add_lora(model, 4, seed=0)
    calls = []
    # Before its forward pass: recomputation stops as soon as it has what it needs.
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for name, arm in gpu.arms(model, lora, 64, 5).items():
        before, calls[:] = [parameter.detach().clone() for parameter in lora], []
        arm.enter()
        arm.step()
        assert any(not torch.equal(now, then) for now, then in zip(lora, before, strict=True)), name
        assert len(calls) == (2 if name == "script, checkpointing" else 1)


def test_waits_for_the_gpu_are_counted(sync_debug_mode):
    def step():
        assert sync_debug_mode == ["warn"]
        for text in ("called a synchronizing CUDA operation", "something else", "called a synchronizing CUDA operation"):
            warnings.warn(text, stacklevel=1)

    assert gpu.synchronizations(gpu.Arm(lambda: None, step)) == 2
    assert sync_debug_mode == ["warn", "default"]


def test_a_loop_that_runs_out_of_memory_says_so(wall_clock):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    found = gpu.timed({"large": gpu.Arm(lambda: None, exhausted), "small": gpu.Arm(lambda: None, lambda: None)}, 0, 2)
    assert found["large"] == {"out_of_memory": "CUDA out of memory"} and len(found["small"]["ms"]) == 2
    entry = {"side": 512, "text_tokens": 32, "arms": {"large": found["large"]}}
    assert "| 512 | 32 | large | out of memory | |  |" in gpu.table([entry])

"""What a training step costs, in counts that do not depend on the machine: they may fall, not rise unseen. And switching."""

import pytest
import torch

from benchmarks.scale import step_flops
from benchmarks.step import Inputs, Ours, Script, arms, counts, gate, table, timings
from benchmarks.switching import measure
from placeholder.config import TrainConfig


@pytest.fixture(scope="module")
def timed() -> dict[str, Script | Ours]:
    return arms()


def test_both_loops_compute_the_same_loss_and_gradients(timed):
    found = gate(timed["script, checkpointing"], timed["ours"])
    assert found["loss_difference"] < 1e-5 and found["gradient_cosine"] > 0.9999


def test_the_gate_stops_a_comparison_of_different_work(timed):
    other = Inputs.random()
    with pytest.raises(SystemExit, match="not the same work"):
        gate(Script(Inputs(other.latents + 0.1, other.embeds), checkpointing=False), timed["ours"])


def test_the_counts_of_a_step(timed):
    script, ours, token = (counts(timed[name]) for name in ("script, checkpointing", "ours", "ours, token"))
    assert ours["flops"] <= 7.44e9 and ours["flops"] < 0.69 * script["flops"]
    assert ours["operations"] <= 3276 and ours["saved_bytes"] <= 24.9e6
    assert token["flops"] <= 7.81e9 and token["operations"] <= 3825 and token["saved_bytes"] <= 31.3e6


def test_every_arm_is_timed_in_turn_and_stands_in_the_table(timed):
    torch.set_num_threads(1)
    seconds = timings({"ours": timed["ours"]}, rounds=2)
    assert len(seconds["ours"]) == 2 * 3 and min(seconds["ours"]) > 0
    record = {"arms": {name: {"median_ms": 10.0, "iqr_ms": 1.0, **counts(arm)} for name, arm in timed.items()}}
    assert all(f"| {name} | 10 (1) | 1.00 |" in table(record) for name in timed)


def test_the_same_archive_again_costs_a_small_part_of_switching_and_that_of_a_cold_start(base, zero_prior, baseline):
    found = measure(base, [zero_prior.archive, baseline.archive])
    assert 5 * found["same_again_s"] < found["switch_s"] < 0.3 * found["cold_start_s"]


def test_the_arithmetic_of_the_full_size_is_that_of_its_shapes():
    """60 blocks, 3072 wide, each with attention and a 4-fold feed-forward layer for image and text, at 1024 x 1024."""
    width, tokens, rank = 3072, 4096 + 128, TrainConfig.rank
    linear = 2 * 12 * width**2 * tokens
    attention = 4 * tokens**2 * width
    lora = 4 * 2 * 2 * rank * width * tokens
    forward = step_flops(TrainConfig(), 1024, 128, backward=False)
    assert forward == pytest.approx(60 * (linear + attention + lora), rel=2e-3)
    # Backwards: the gradient of every input, that of the LoRA's weights, and 2.5 times the attention.
    step = step_flops(TrainConfig(), 1024, 128)
    assert step == pytest.approx(60 * (2 * linear + 3.5 * attention + 3 * lora), rel=1e-2)

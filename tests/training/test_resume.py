"""A training that goes on where it was interrupted, and one that starts from earlier weights."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job, Stop, StoppedError
from placeholder.model.base import BaseModel
from placeholder.training.checkpoint import FACTS_KEY, read_checkpoint, stored_checkpoints, write_checkpoint
from placeholder.training.examples import BatchSampler
from placeholder.training.loop import TrainState
from placeholder.training.losses import Denoiser
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer
from placeholder.training.resume import resume_path, resumed_config
from tests.support.samples import Run, write_dataset
from tests.support.trainings import child_training

LORA, ROWS = "lora/lora_weights.safetensors", "embeddings/zwx.safetensors"
EVERY = 5


@pytest.fixture(scope="module")
def interrupted(zero_prior, dataset, base, tmp_path_factory) -> Path:
    """Checkpoints of steps 5 and 8 of the shared training, which was asked to stop in its eighth."""
    folder, stop = tmp_path_factory.mktemp("checkpoints"), Stop()

    def log(line: str) -> None:
        if " 8/15 [" in line:
            stop.wanted = True

    with pytest.raises(StoppedError, match="stopped after step 8: resume_from takes its checkpoint"):
        finetune(
            Job(dataset, zero_prior.config, folder / "w.zip", checkpoints=CheckpointFolder(folder, EVERY)), base, log, stop=stop
        )
    assert [path.name[11:17] for path in stored_checkpoints(folder)] == ["000005", "000008"]
    assert not (folder / "w.zip").exists()
    return folder


def resumed(start: Path, run: Run, dataset, base, output: Path, **changes) -> Run:
    config, log = replace(run.config, **changes), []
    return Run(config, output, finetune(Job(dataset, config, output, resume_from=start), base, log.append), log)


@pytest.mark.parametrize("step", [5, 8])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(step, interrupted, zero_prior, dataset, base, tmp_path):
    start = interrupted / f"checkpoint-{step:06}.safetensors"
    found = resumed(start, zero_prior, dataset, base, tmp_path / "w.zip", seed=None)
    for name in (LORA, ROWS):
        assert found.entry(name) == zero_prior.entry(name)
    differing = {name for name in found.meta if found.meta[name] != zero_prior.meta[name]}
    assert differing <= {"created", "training_seconds", "expected_peak_gb"}
    assert f"Resumed from {start.name} after step {step}" in found.log
    assert not any(f" {step}/15 [" in line for line in found.log)
    assert any(f" {step + 1}/15 [" in line for line in found.log)


def started(config: TrainConfig, folder: Path, dataset: Path, base: BaseModel) -> subprocess.Popen:
    """The training as a process of its own, with its log on a pipe."""
    checkpoints = CheckpointFolder(folder / "checkpoints", EVERY)
    return child_training(Job(dataset, config, folder / "w.zip", checkpoints=checkpoints), base.source, folder / "job")


def send_at(moment: str, number: signal.Signals, running: subprocess.Popen) -> str:
    """Send a signal when a line with `moment` has come, and wait for the end; returns what came after it."""
    for line in running.stdout:
        if moment in line:
            running.send_signal(number)
            return running.communicate()[0]
    raise AssertionError("the training ended before its moment")


def test_a_killed_training_loses_no_more_than_the_steps_since_its_checkpoint(zero_prior, dataset, base, tmp_path):
    running = started(zero_prior.config, tmp_path, dataset, base)
    send_at(" 9/15 [", signal.SIGKILL, running)
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "w.zip").exists()
    stored = stored_checkpoints(tmp_path / "checkpoints")
    assert stored[0].name == "checkpoint-000005.safetensors"
    found = resumed(stored[0], zero_prior, dataset, base, tmp_path / "w.zip")
    assert (found.entry(LORA), found.entry(ROWS)) == (zero_prior.entry(LORA), zero_prior.entry(ROWS))


def test_a_training_that_is_told_to_end_leaves_a_last_checkpoint(zero_prior, dataset, base, tmp_path):
    running = started(replace(zero_prior.config, steps=20000), tmp_path, dataset, base)
    told = send_at(" 200/20000 [", signal.SIGTERM, running)
    assert running.returncode == 1
    assert "Traceback" not in told
    (_, last) = stored_checkpoints(tmp_path / "checkpoints")
    assert f"Checkpoint: step {int(last.stem[-6:])}" in told
    assert not (tmp_path / "w.zip").exists()


def test_a_training_can_be_resumed_with_more_steps_and_when_it_was_complete(zero_prior, dataset, base, tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", 15)
    first = Run(zero_prior.config, tmp_path / "1.zip", {}, [])
    meta = finetune(Job(dataset, first.config, first.archive, checkpoints=checkpoints), base, first.log.append)
    again = resumed(checkpoints.path, zero_prior, dataset, base, tmp_path / "2.zip")
    assert again.entry(LORA) == first.entry(LORA)
    assert again.meta["loss"] == meta["loss"]
    longer = resumed(checkpoints.path, zero_prior, dataset, base, tmp_path / "3.zip", steps=17)
    assert longer.meta["steps"] == 17
    assert longer.entry(LORA) != first.entry(LORA)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(zero_prior, dataset, base, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("placeholder.training.checkpoint.save_file", full)
    log: list[str] = []
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", 10)
    finetune(Job(dataset, zero_prior.config, tmp_path / "w.zip", checkpoints=checkpoints), base, log.append)
    assert any(line.startswith("Warning: the checkpoint of step 10 could not be written ([Errno 28] No space") for line in log)
    assert Run(zero_prior.config, tmp_path / "w.zip", {}, log).entry(LORA) == zero_prior.entry(LORA)


def test_the_weights_of_an_earlier_training_are_where_a_new_one_starts(zero_prior, dataset, base, tmp_path):
    found = resumed(zero_prior.archive, zero_prior, dataset, base, tmp_path / "w.zip", steps=1, learning_rate=1e-6)
    assert any(line.startswith("Started from the weights of an earlier training: ") for line in found.log)
    assert any("the optimizers start anew" in line for line in found.log)
    assert len(found.meta["started_from"]) == 64
    before, after = zero_prior.tensors(LORA), found.tensors(LORA)
    moved = max((after[key].float() - before[key].float()).abs().max().item() for key in before)
    assert moved < 1e-3  # one step at 1e-6, stored in bf16
    assert max(value.float().abs().max().item() for key, value in after.items() if "lora_B" in key) > 1e-2
    row = zero_prior.tensors(ROWS)["qwen25_7b"]
    torch.testing.assert_close(found.tensors(ROWS)["qwen25_7b"], row, atol=1e-3, rtol=0)
    assert row.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 8}, "was made with rank 4, this training has 8: give the same to go on, or leave resume_from out"),
        ({"seed": 2}, "was made with seed 1, this training has 2"),
        ({"resolution": (64, 80)}, r"was made with resolution \[64\], this training has \[64, 80\]"),
        ({"placeholder_token": ("<qrs>",)}, r"was made with placeholder_token \['<zwx>'\], this training has \['<qrs>'\]"),
        ({"steps": 7}, "has made 8 steps, this training is to make 7: give more"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_before_any_weight_is_loaded(
    changes, sentence, interrupted, zero_prior, dataset, base, tmp_path
):
    with pytest.raises(ValueError, match=sentence):
        resumed(interrupted, zero_prior, dataset, base, tmp_path / "w.zip", **changes)


def test_where_the_embedding_learns_first_the_steps_may_not_change(interrupted, zero_prior):
    start = read_checkpoint(resume_path(interrupted))
    start.facts["config"]["placeholder_warmup_fraction"] = 0.5
    config = replace(zero_prior.config, placeholder_warmup_fraction=0.5)
    assert resumed_config(start, config, {}).steps == 15
    with pytest.raises(ValueError, match="was made with steps 15, this training has 30: give the same to go on"):
        resumed_config(start, replace(config, steps=30), {})


def test_a_checkpoint_of_another_data_set_or_base_is_refused(interrupted, zero_prior, base, dataset, tmp_path):
    other = write_dataset(tmp_path / "other.zip", ["a photo of <zwx>", "<zwx> in a house", None])
    with pytest.raises(ValueError, match="checkpoint-000008.safetensors was made on another data set: give the one"):
        resumed(interrupted, zero_prior, other, base, tmp_path / "w.zip")
    with pytest.raises(ValueError, match="was made with base_model .*, this training has 'another'"):
        resumed(interrupted, zero_prior, dataset, replace(base, source="another"), tmp_path / "w.zip")


def test_weights_that_the_training_cannot_start_from_are_refused(zero_prior, baseline, dataset, base, tmp_path):
    with pytest.raises(ValueError, match="were trained with no token, this training has <zwx>: give the same"):
        resumed(baseline.archive, zero_prior, dataset, base, tmp_path / "w.zip")
    with pytest.raises(ValueError, match=r"the LoRA to start from has rank 4, this training 8: give the same"):
        resumed(baseline.archive, baseline, dataset, base, tmp_path / "w.zip", rank=8)
    other = baseline.tensors(LORA) | {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 32)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has .*to_q\.lora_A.* of shape \(4, 32\), this training makes \(4, 64\): give an"):
        resumed(tmp_path / "other.safetensors", baseline, dataset, base, tmp_path / "w.zip")
    fewer = {key: value for key, value in baseline.tensors(LORA).items() if "transformer_blocks.0.attn.to_q.lora_A" not in key}
    save_file(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(ValueError, match=r"on other layers than this training's, 1 weights differ, among them '.*to_q\.lora_A"):
        resumed(tmp_path / "fewer.safetensors", baseline, dataset, base, tmp_path / "w.zip")


def test_what_is_not_there_gets_its_sentence(zero_prior, dataset, base, tmp_path):
    with pytest.raises(ValueError, match="resume_from .*missing does not exist: give a checkpoint, a folder"):
        resumed(tmp_path / "missing", zero_prior, dataset, base, tmp_path / "w.zip")
    with pytest.raises(ValueError, match="resume_from .* holds no checkpoint: leave it out"):
        resumed(tmp_path, zero_prior, dataset, base, tmp_path / "w.zip")


@pytest.mark.parametrize(
    "facts",
    [{}, {"config": 3}, {"config": {}}, {"step": "x"}, {"progress": None}, {"state": {"items": 3}}, {"state": 3}, {"x": 1}],
)
def test_a_checkpoint_with_other_facts_gets_a_sentence(facts, interrupted, zero_prior, dataset, base, tmp_path):
    stored = read_checkpoint(interrupted / "checkpoint-000008.safetensors")
    state = {"state": {"items": [["step", 8]]}}
    changed = stored.facts | state | facts if facts else state
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", metadata={FACTS_KEY: json.dumps(changed)})
    with pytest.raises(
        ValueError, match="c.safetensors (does not say|is damaged|is not a checkpoint of such|was made with rank None)"
    ):
        resumed(tmp_path / "c.safetensors", zero_prior, dataset, base, tmp_path / "w.zip")


class Small(torch.nn.Module):
    """A transformer as far as the state is concerned."""

    device, dtype, time_text_embed = torch.device("cpu"), torch.float32, None


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adam8bit", "prodigy"])
def test_every_optimizer_goes_on_as_if_nothing_had_happened(name, tmp_path):
    def fresh() -> TrainState:
        generator = torch.Generator().manual_seed(0)
        # Two larger than 4096 numbers, from where on bitsandbytes stores states in 8 bits.
        lora = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 80), (4, 6), (70, 70))]
        tokens = TokenOptimizer(torch.nn.Parameter(torch.randn(2, 8, generator=generator)), 1e-2, 100.0)
        sampler = BatchSampler([None] * 5, (), 1, 0.0, generator)
        return TrainState(Denoiser(Small()), None, lora, lora_optimizer(name, lora, 1e-2), sampler, None, None, tokens)

    def train(state: TrainState, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            state.step += 1
            for parameter in (*state.lora, state.token_rows):
                parameter.grad = torch.randn(parameter.shape, generator=state.sampler.generator) + state.sampler._next_index()
            state.lora_optimizer.step()
            state.token_optimizer.step()
        return [parameter.detach().clone() for parameter in (*state.lora, state.token_rows)]

    whole = train(fresh(), 12)
    first, second = fresh(), fresh()
    train(first, 7)
    second.load_state_dict(read_checkpoint(write_checkpoint(CheckpointFolder(tmp_path, 1), 7, first.state_dict(), {})).state)
    assert second.step == 7
    assert all(torch.equal(found, wanted) for found, wanted in zip(train(second, 5), whole, strict=True))

"""Checkpoint files: whole or not there, the newest two, and no one else's lost."""

import errno
import resource
from types import SimpleNamespace

import pytest
import torch

from placeholder.job import CheckpointFolder, Stop, StoppedError
from placeholder.training import checkpoint as checkpoint_module
from placeholder.training.checkpoint import (
    CheckpointWriter,
    is_checkpoint,
    prepare_folder,
    read_checkpoint,
    stored_checkpoints,
    write_checkpoint,
)
from placeholder.training.resume import read_start
from tests.support.samples import write_zip

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    found = CheckpointFolder(tmp_path / "deep" / "checkpoints", 5)
    prepare_folder(found, None)
    return found


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def test_a_checkpoint_comes_back_as_it_was_written(folder):
    found = read_checkpoint(write_checkpoint(folder, 5, TENSORS, {"step": 5, "loss": 0.1, "deep": [{"x": None}]}))
    assert found.name == "checkpoint-000005.safetensors"
    assert found.facts == {"step": 5, "loss": 0.1, "deep": [{"x": None}]}
    assert found.state.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[name]) and value.dtype == TENSORS[name].dtype for name, value in found.state.items())


def test_the_newest_two_are_kept_and_what_is_not_ours(folder):
    (folder.path / "notes.txt").write_text("mine")
    for step in (5, 10, 15, 20):
        write_checkpoint(folder, step, TENSORS, {})
    assert names(folder) == ["checkpoint-000015.safetensors", "checkpoint-000020.safetensors", "notes.txt"]
    assert [path.name for path in stored_checkpoints(folder.path)] == names(folder)[:2]


def test_weights_that_are_not_finite_make_no_checkpoint(folder):
    log, lora, rows = [], torch.ones(2), torch.ones(2)
    state = SimpleNamespace(lora=[lora], token_optimizer=SimpleNamespace(rows=rows), state_dict=lambda: TENSORS)
    writer = CheckpointWriter(folder, state, dict, log.append, Stop())
    writer.step(SimpleNamespace(number=5))
    for values in (lora, rows):
        values[1] = torch.nan
        writer.step(SimpleNamespace(number=10))
        values[1] = 1
    assert names(folder) == ["checkpoint-000005.safetensors"]
    assert log[1:] == ["Warning: no checkpoint of step 10: the LoRA or a token embedding is not finite"] * 2
    lora[1] = torch.nan
    writer.stop.wanted = True
    with pytest.raises(StoppedError, match="takes the newest checkpoint that could be written"):
        writer.step(SimpleNamespace(number=12))


@pytest.mark.parametrize("call", ["save_file", "_flush"])
def test_a_full_disk_leaves_nothing_half_written_and_the_earlier_checkpoint(call, folder, monkeypatch):
    write_checkpoint(folder, 5, TENSORS, {"step": 5})
    original = getattr(checkpoint_module, call)

    def full(*arguments, **options):
        original(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(folder, 10, TENSORS, {"step": 10})
    assert names(folder) == ["checkpoint-000005.safetensors"]


def test_an_error_of_the_file_system_itself_is_an_oserror(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # no file may grow beyond 64 bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(folder, 5, TENSORS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []


def test_a_partial_file_of_a_killed_training_is_in_nobodys_way(folder):
    (folder.path / checkpoint_module.PARTIAL).write_bytes(b"half")
    prepare_folder(folder, None)
    assert names(folder) == []
    write_checkpoint(folder, 5, TENSORS, {})
    assert len(stored_checkpoints(folder.path)) == 1


def test_checkpoints_of_another_training_are_not_overwritten(folder):
    first, second = write_checkpoint(folder, 5, TENSORS, {}), write_checkpoint(folder, 10, TENSORS, {})
    with pytest.raises(ValueError, match=r"holds checkpoint-000010.safetensors of an earlier training: give it as resume_from"):
        prepare_folder(folder, None)
    with pytest.raises(ValueError, match=r"holds checkpoint-000010.safetensors, which is later than checkpoint-000005"):
        prepare_folder(folder, first)
    prepare_folder(folder, second)


def test_a_folder_that_cannot_be_made_gets_its_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="checkpoint_folder .*file/inside cannot be written .*: name another folder"):
        prepare_folder(CheckpointFolder(tmp_path / "file" / "inside", 5), None)


@pytest.mark.parametrize(("steps", "every"), [(1000, 100), (20000, 2000), (15, 50), (500, 50)])
def test_without_a_number_a_tenth_of_the_steps_but_at_least_fifty(steps, every, tmp_path):
    assert CheckpointFolder.of(str(tmp_path), None, steps).every == every
    assert CheckpointFolder.of(str(tmp_path), 7, steps).every == 7


def test_the_inputs_are_checked():
    assert CheckpointFolder.of(None, None, 100) is None
    with pytest.raises(ValueError, match="checkpoint_every is 5 without a checkpoint_folder: name a folder"):
        CheckpointFolder.of(None, 5, 100)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-3], lambda content: content.replace(b'\\"step\\"', b'\\"step', 1)]
)
def test_a_damaged_checkpoint_gets_its_sentence(damage, folder):
    path = write_checkpoint(folder, 5, TENSORS, {"step": 5})
    content = path.read_bytes()
    damaged = damage(content)
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="the checkpoint checkpoint-000005.safetensors is damaged"):
        read_start(path)


def test_only_our_own_files_are_checkpoints(folder, tmp_path):
    assert is_checkpoint(write_checkpoint(folder, 5, TENSORS, {}))
    assert not is_checkpoint(write_zip(tmp_path / "weights.zip", {"a": b"b"}))

"""Memory and disks that do not suffice: one sentence, and what the failed work held is given back."""

import errno
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from placeholder.config import TrainConfig
from placeholder.errors import readable_errors
from placeholder.generate import save_image
from placeholder.model.base import MODEL_VARIABLE
from placeholder.model.download import local_file
from placeholder.model.loading import load_transformer
from placeholder.service.files import OutputFolder
from placeholder.service.launch import finetune_on_all_gpus
from placeholder.training import setup as prepare_module
from placeholder.weights import archive as weights_module
from tests.conftest import SHORT
from tests.support.samples import picture
from tests.test_generate import PLAIN

MEMORY = "the memory does not suffice: eat less"
DISK = "the disk is full: make room for temporary files, or name a folder that has room in TMPDIR"


def allocate_too_much() -> torch.Tensor:
    """What PyTorch says on a CPU."""
    return torch.empty(10**15)


def raised(error: Exception):
    """Raises the error."""

    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (allocate_too_much, MEMORY),
        (raised(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")), MEMORY),
        (raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), MEMORY),
        (raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), MEMORY),
        (raised(MemoryError()), MEMORY),
        (raised(OSError(errno.ENOMEM, "Cannot allocate memory")), MEMORY),
        (raised(OSError(errno.ENOSPC, "No space left on device")), DISK),
        (raised(OSError(errno.EDQUOT, "Disk quota exceeded")), DISK),
        (raised(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")), DISK),
    ],
)
def test_memory_and_disk_get_their_sentence(work, sentence):
    with pytest.raises(RuntimeError) as found, readable_errors("eat less"):
        work()
    assert str(found.value) == sentence
    assert found.value.__cause__ is not None


@pytest.mark.parametrize(
    "error", [ValueError("a bad prompt"), RuntimeError("shapes differ"), OSError("none"), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as found, readable_errors("eat less"):
        raise error
    assert found.value is error


def test_a_library_that_stumbles_while_it_tidies_up_does_not_hide_the_memory():
    with pytest.raises(RuntimeError, match=MEMORY), readable_errors("eat less"):
        try:
            raise MemoryError
        except MemoryError:
            {}.pop("default")


def test_a_sentence_inside_another_stays():
    with pytest.raises(RuntimeError, match=MEMORY), readable_errors("sleep more"), readable_errors("eat less"):
        raise MemoryError


def test_what_the_failed_work_held_is_given_back_while_the_error_is_still_there():
    held: list[weakref.ref] = []

    def work() -> None:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(RuntimeError) as found, readable_errors("eat less"):
        work()
    assert found.value.__cause__.__traceback__ is not None
    assert held[0]() is None


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_a_full_disk_gets_its_sentence_while_a_picture_is_saved(output_format, tmp_path):
    (tmp_path / f"output.{output_format}").symlink_to("/dev/full")  # every write fails with ENOSPC
    with pytest.raises(RuntimeError, match=DISK):
        save_image(picture(), replace(PLAIN, output_format=output_format), tmp_path)


def test_a_full_disk_gets_its_sentence_while_weights_are_fetched(site, tmp_path, monkeypatch):
    address, folder = site
    (folder / "weights.zip").write_bytes(bytes(100_000))
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(RuntimeError, match=DISK), local_file(f"{address}/weights.zip"):
        pass


def test_a_full_disk_gets_its_sentence_before_anything_is_drawn(tmp_path, monkeypatch):
    def full(path: Path, mode: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RuntimeError, match=DISK), OutputFolder("placeholder-").fresh():
        pass


def test_a_cancelled_training_holds_no_memory(base, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    loaded = []

    def load(*arguments):
        transformer = load_transformer(*arguments)
        loaded.append(weakref.ref(transformer))
        return transformer

    def cancelled(line: str) -> None:
        if " 2/15 [" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "load_transformer", load)
    with pytest.raises(KeyboardInterrupt):
        finetune_on_all_gpus(dataset, TrainConfig(**SHORT), tmp_path / "weights.zip", cancelled)
    assert [reference() for reference in loaded] == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_runs_out_of_memory_says_what_takes_less(base, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    monkeypatch.setattr(prepare_module, "load_transformer", lambda *_: allocate_too_much())
    sentence = "the memory does not suffice: give a smaller resolution or batch_size, or set quantize"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        finetune_on_all_gpus(dataset, TrainConfig(**SHORT), tmp_path / "weights.zip", lambda _: None)


def test_a_disk_that_is_full_while_the_archive_is_written_leaves_nothing(base, dataset, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    monkeypatch.setattr(weights_module, "save", full)
    config = TrainConfig(**SHORT | {"steps": 2}, train_placeholder_token=True, placeholder_token=("<zwx>",))
    with pytest.raises(RuntimeError, match=f"^{DISK}$"):
        finetune_on_all_gpus(dataset, config, tmp_path / "weights.zip", lambda _: None)
    assert list(tmp_path.iterdir()) == []

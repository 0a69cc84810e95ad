"""How names, values and errors are shown; out of memory and out of disk space as one sentence, with the memory freed."""

import errno
import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import SafetensorError

from placeholder.config import TrainConfig
from placeholder.errors import MAX_SHOWN, label, quoted, readable_errors, reason, shown
from placeholder.finetune import finetune
from placeholder.generate import save_image
from placeholder.job import Job
from placeholder.model.download import local_file
from placeholder.service.files import OutputFolder
from placeholder.weights import archive as weights_module
from tests.conftest import SHORT
from tests.support.predictions import PLAIN
from tests.support.samples import picture

MEMORY = "out of memory: eat less"
DISK = "the disk is full: make room for the output, and for temporary files or name a folder with room in TMPDIR"


@pytest.mark.parametrize("name", ["a.png", "folder/a b.png", "\u00e9.png", "\u5199\u771f.png"])
def test_a_plain_name_is_shown_as_it_is(name):
    assert label(name) == name
    assert quoted(name) == f"'{name}'"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\udcff", "\u202e", "x" * 5000, "\0" * 5000])
def test_any_other_name_is_quoted_escaped_and_cut(name):
    assert label(name) == quoted(name)
    assert quoted(name).isprintable()
    assert len(quoted(name)) <= MAX_SHOWN + 3


def test_a_huge_or_nested_value_is_shown_short():
    nested: list = []
    for _ in range(500):
        nested = [nested]
    assert len(shown("x" * 10_000)) < 100
    assert len(shown(nested)) < 100
    assert shown([10**5000]) == "too long a number"


@pytest.mark.parametrize(
    ("text", "line"),
    [("two\n lines", "two lines"), ("\x1b[31mred", "?[31mred"), ("", "ValueError"), ("x" * 5000, f"{'x' * 200}...{'x' * 200}")],
)
def test_an_error_is_shown_on_one_short_line(text, line):
    assert reason(ValueError(text)) == line


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


def test_a_library_that_fails_while_it_cleans_up_does_not_hide_the_memory():
    with pytest.raises(RuntimeError, match=MEMORY), readable_errors("eat less"):
        try:
            raise MemoryError
        except MemoryError:
            {}.pop("default")


def test_a_sentence_inside_another_stays():
    with pytest.raises(RuntimeError, match=MEMORY), readable_errors("sleep more"), readable_errors("eat less"):
        raise MemoryError


def test_the_memory_of_failed_work_is_freed_while_its_error_is_still_there():
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
def test_a_full_disk_gets_its_sentence_while_an_image_is_saved(output_format, tmp_path):
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


def test_a_full_disk_gets_its_sentence_before_anything_is_generated(tmp_path, monkeypatch):
    def full(path: Path, mode: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RuntimeError, match=DISK), OutputFolder("placeholder-").fresh():
        pass


def transformers() -> int:
    """How many transformers are in memory."""
    return sum(isinstance(found, QwenImageTransformer2DModel) for found in gc.get_objects())


def test_a_canceled_training_holds_no_memory(base, dataset, tmp_path):
    gc.collect()
    before, during = transformers(), []

    def cancel(line: str) -> None:
        if " 2/15 [" in line:
            during.append(transformers())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), readable_errors():
        finetune(Job(dataset, TrainConfig(**SHORT), tmp_path / "weights.zip"), base, cancel)
    assert transformers() == before < during[0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_the_archive_is_written_leaves_nothing(base, dataset, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights_module, "save", full)
    config = TrainConfig(**SHORT | {"steps": 2}, train_placeholder_token=True, placeholder_token=("<zwx>",))
    with pytest.raises(RuntimeError, match=f"^{DISK}$"), readable_errors():
        finetune(Job(dataset, config, tmp_path / "weights.zip"), base, lambda _: None)
    assert list(tmp_path.iterdir()) == []

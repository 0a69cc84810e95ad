"""Checkpoints of a training: files in a folder of the user's, each written whole or not at all, the newest two kept."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from placeholder.job import CheckpointFolder

FACTS_KEY = "placeholder_checkpoint"  # in the safetensors header: what is no tensor, as JSON
KEPT = 2
MAX_FACTS_BYTES = 16 * 1024**2
NAME = re.compile(r"checkpoint-(\d{6})\.safetensors")
PARTIAL = "checkpoint.partial"


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a training: `tensors` by name, and `facts` that JSON can hold."""

    name: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def prepare_folder(folder: CheckpointFolder, resumed: Path | None) -> None:
    """Make the folder and see that nothing in it would be lost: it holds no later checkpoint than the one resumed from.

    Raises ValueError otherwise, or where nothing can be written into it.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / PARTIAL).touch()
        (folder.path / PARTIAL).unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoint_folder {folder.path} cannot be written ({error.strerror}): name another folder"
        ) from error
    stored = stored_checkpoints(folder.path)
    if not stored:
        return
    if resumed is None or resumed.parent.resolve() != folder.path.resolve():
        raise ValueError(
            f"checkpoint_folder {folder.path} holds {stored[-1].name} of an earlier training: give it as resume_from, "
            "or name an empty folder"
        )
    if stored[-1].name != resumed.name:
        raise ValueError(
            f"checkpoint_folder {folder.path} holds {stored[-1].name}, which is later than {resumed.name}: resume from that, "
            "or move it away"
        )


def write_checkpoint(folder: CheckpointFolder, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Store a checkpoint; the newest two stay. Raises OSError where it cannot be written, and then leaves nothing of it."""
    target, partial = folder.path / f"checkpoint-{step:06}.safetensors", folder.path / PARTIAL
    try:
        save_file(tensors, partial, metadata={FACTS_KEY: json.dumps(facts)})
        _flush(partial)
        partial.replace(target)
    except safetensors.SafetensorError as error:  # what it makes of an error of the file system
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems do not flush folders
        _flush(folder.path)
    for old in stored_checkpoints(folder.path)[:-KEPT]:
        with suppress(FileNotFoundError):
            old.unlink()
    return target


def stored_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def is_checkpoint(path: Path) -> bool:
    """Whether the file is a checkpoint of ours, by its header."""
    try:
        return FACTS_KEY in _header(path)
    except safetensors.SafetensorError:
        return False


def read_checkpoint(path: Path) -> Checkpoint:
    """A stored checkpoint; raises ValueError where it is damaged."""
    try:
        text = _header(path)[FACTS_KEY]
        facts = json.loads(text) if len(text) <= MAX_FACTS_BYTES else None
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"the checkpoint {path.name} is damaged ({error}): resume from the one before it") from error
    if not isinstance(facts, dict):
        raise ValueError(f"the checkpoint {path.name} is damaged: resume from the one before it")
    return Checkpoint(path.name, tensors, facts)


def _header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def _flush(path: Path) -> None:
    """Have a file, or the entries of a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

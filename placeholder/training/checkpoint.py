"""Checkpoints of a training: files in a folder of the user's, each written whole or not at all, the newest two kept."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from placeholder.errors import Log
from placeholder.job import CheckpointFolder, Stop, StoppedError
from placeholder.training.loop import Step, TrainState

FACTS_KEY = "placeholder_checkpoint"  # in the safetensors header: all that is no tensor, as JSON
KEPT = 2
MAX_FACTS_BYTES = 16 * 1024**2
NAME = re.compile(r"checkpoint-(\d{6})\.safetensors")
PARTIAL = "checkpoint.partial"


@dataclass(frozen=True)
class Checkpoint:
    """A stored checkpoint: the training's `state_dict`, and `facts` such as its configuration."""

    name: str
    state: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class CheckpointWriter:
    """Observes the steps: writes a checkpoint when one is due, and a last one when the training is asked to stop."""

    folder: CheckpointFolder
    state: TrainState
    facts: Callable[[], dict[str, Any]]
    log: Log
    stop: Stop

    def step(self, step: Step) -> None:
        """Write a checkpoint where one is due; raises StoppedError where the training was asked to stop."""
        stopping = self.stop.wanted
        saved = (stopping or step.number % self.folder.every == 0) and self._write(step.number)
        if stopping:
            last = "its checkpoint" if saved else "the newest checkpoint that could be written"
            raise StoppedError(f"the training was stopped after step {step.number}: resume_from takes {last}")

    def _write(self, number: int) -> bool:
        trained = [*self.state.lora, *([self.state.token_optimizer.rows] if self.state.token_optimizer else [])]
        if not all(torch.isfinite(values).all() for values in trained):
            self.log(f"Warning: no checkpoint of step {number}: the LoRA or a token embedding is not finite")
            return False
        try:
            write_checkpoint(self.folder, number, self.state.state_dict(), self.facts() | {"step": number})
        except OSError as error:  # a full disk costs the checkpoint, not the training
            self.log(
                f"Warning: the checkpoint of step {number} could not be written ({error}): the training goes on without it"
            )
            return False
        self.log(f"Checkpoint: step {number}")
        return True


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


def write_checkpoint(folder: CheckpointFolder, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Store a checkpoint; the newest two stay. Raises OSError where it cannot be written, and then leaves nothing of it."""
    target, partial = folder.path / f"checkpoint-{step:06}.safetensors", folder.path / PARTIAL
    tensors: dict[str, Tensor] = {}
    described = facts | {"state": _without_tensors(state, "state", tensors)}
    try:
        save_file(tensors, partial, metadata={FACTS_KEY: json.dumps(described)})
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
    """Whether the file is a checkpoint of ours, by its header, or by its name where that cannot be read."""
    try:
        return FACTS_KEY in _header(path)
    except safetensors.SafetensorError:
        return bool(NAME.fullmatch(path.name))


def read_checkpoint(path: Path) -> Checkpoint:
    """A stored checkpoint; raises ValueError where it is damaged."""
    try:
        text = _header(path)[FACTS_KEY]
        if len(text) > MAX_FACTS_BYTES:
            raise ValueError(f"its description has {len(text)} bytes")
        facts = json.loads(text)
        state = _with_tensors(facts.pop("state"), load_file(path))
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {path.name} is damaged ({error}): resume from the one before it") from error
    return Checkpoint(path.name, state, facts)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it: the tensors in it, at any depth, go into `tensors` under names that begin with `name`.

    Dictionaries become lists of pairs, because their keys may be numbers.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()  # of its own: bitsandbytes shares tables between parameters
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _without_tensors(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `_without_tensors`; tuples come back as lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]].clone()
        return {key: _with_tensors(item, tensors) for key, item in value["items"]}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value


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

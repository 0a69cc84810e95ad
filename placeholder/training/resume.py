"""Where a training starts that does not start anew: from a checkpoint, or from the weights of an earlier one."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict

from placeholder.config import OPTIONS, TrainConfig
from placeholder.errors import shown
from placeholder.lora.adapter import ADAPTER, lora_state_dict
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.training.checkpoint import Checkpoint, is_checkpoint, read_checkpoint, stored_checkpoints
from placeholder.training.examples import Position
from placeholder.training.loop import TrainState
from placeholder.training.training_state import restore, restore_position
from placeholder.weights.archive import Weights, read_weights

RECORDED = {"losses", "preservations", "loss", "seconds", "curve"}  # what Record.facts returns
MAY_DIFFER = tuple(name for name, option in OPTIONS.items() if option.resume_may_change)


def resume_path(source: Path) -> Path:
    """The file to start from: `source`, or the newest checkpoint where it is a folder. Raises ValueError where there is none."""
    if source.is_dir():
        stored = stored_checkpoints(source)
        if not stored:
            raise ValueError(f"resume_from {source} holds no checkpoint: leave it out, or name a checkpoint or a weights.zip")
        return stored[-1]
    if not source.is_file():
        raise ValueError(f"resume_from {source} is not there: give a checkpoint, a folder of checkpoints or a weights.zip")
    return source


def read_start(path: Path) -> Checkpoint | Weights:
    """A checkpoint, or a weights archive, told apart by content. Raises ValueError for anything else."""
    return read_checkpoint(path) if is_checkpoint(path) else read_weights(path)


def config_of(start: Checkpoint | Weights, config: TrainConfig, facts: dict[str, Any]) -> TrainConfig:
    """The configuration to go on with: a blank seed and a blank `torch_compile` are the checkpoint's.

    `facts` are those of this training that a checkpoint has to share, such as its base model. Raises ValueError where the
    training would not be the one that was interrupted, or could not start from those weights.
    """
    if isinstance(start, Weights):
        _check_tokens(start, config)
        return config
    recorded = start.facts.get("config")
    if not isinstance(recorded, dict):
        raise ValueError(f"{start.name} does not say how it was trained: resume from another checkpoint")
    if config.seed is None:
        config = replace(config, seed=recorded.get("seed"))
    if config.torch_compile is None:
        config = replace(config, torch_compile=recorded.get("torch_compile"))
    wanted = {name: value for name, value in asdict(config).items() if name not in MAY_DIFFER}
    found = {name: value for name, value in recorded.items() if name not in MAY_DIFFER}
    for name, value, stored in _pairs(wanted | facts, found | {name: start.facts.get(name) for name in facts}):
        if value != stored:
            raise ValueError(
                f"{start.name} was made with {name} {shown(stored)}, this training has {shown(value)}: give the same to go on, "
                "or leave resume_from out"
            )
    step, record = start.facts.get("step"), start.facts.get("record")
    if not isinstance(record, dict) or record.keys() != RECORDED or not isinstance(step, int):
        raise ValueError(f"{start.name} does not say how far it was trained: resume from another checkpoint")
    if step > config.steps:
        raise ValueError(f"{start.name} has made {step} steps, this training is to make {config.steps}: give more")
    return config


def check_dataset(start: Checkpoint | Weights | None, digest: str) -> None:
    """Raise ValueError where a checkpoint was made on other pictures, captions or crops than those of this digest."""
    if isinstance(start, Checkpoint) and start.facts.get("dataset_digest") != digest:
        raise ValueError(_other_dataset(start))


def stored_descriptions(start: Checkpoint | Weights | None, count: int) -> list[str] | None:
    """What a checkpoint's training found to say of its `count` pictures without a caption, so that it is not asked again.

    None without a checkpoint. Raises ValueError where it holds none, or of another number of pictures.
    """
    if not isinstance(start, Checkpoint) or not count:
        return None
    found = start.facts.get("descriptions")
    if not isinstance(found, list) or not all(isinstance(description, str) for description in found):
        raise ValueError(f"{start.name} does not hold the captions it was trained with: resume from another checkpoint")
    if len(found) != count:
        raise ValueError(_other_dataset(start))
    return found


def stored_table(start: Checkpoint | Weights | None) -> bool | None:
    """Whether a checkpoint was made with the modulations as a table; None without a checkpoint, and for one that does not say."""
    found = start.facts.get("modulations_tabled") if isinstance(start, Checkpoint) else None
    return found if isinstance(found, bool) else None


def check_storage(start: Checkpoint | Weights | None, storage: str) -> None:
    """Raise ValueError where a checkpoint was made with the transformer stored otherwise, which `quantize` leaves to the memory."""
    if isinstance(start, Checkpoint) and (stored := start.facts.get("transformer_storage")) != storage:
        raise ValueError(
            f"{start.name} was made with the transformer stored as {shown(stored)}, the memory that is free here makes it {storage}: "
            "go on where as much memory is free as there, or leave resume_from out"
        )


def start_position(start: Checkpoint | Weights | None, generator: torch.Generator) -> Position:
    """Where the training begins: at its first step with the randomness of `generator`, or where a checkpoint was left."""
    position = Position(generator)
    if isinstance(start, Checkpoint):
        restore_position(position, start.tensors, start.facts.get("state"))
    return position


def apply_start(start: Checkpoint | Weights, train_state: TrainState, tokens: PlaceholderTokens, position: Position) -> str:
    """Put the start in the place of the fresh LoRA and rows; returns the line that says what was done."""
    if isinstance(start, Checkpoint):
        restore(train_state, position, start.tensors, start.facts.get("state"))
        return f"Resumed from {start.name} after step {position.step}"
    fresh = lora_state_dict(train_state.transformer)
    wrong = sorted(key for key in fresh.keys() | start.lora.keys() if _shape(fresh, key) != _shape(start.lora, key))
    if wrong:
        raise ValueError(
            f"the LoRA to start from has {wrong[0]} of shape {_shape(start.lora, wrong[0])}, this training makes "
            f"{_shape(fresh, wrong[0])}: give the rank it was trained with"
        )
    set_peft_model_state_dict(train_state.transformer, start.lora, adapter_name=ADAPTER)
    with torch.no_grad():
        for token, rows in start.embeddings.items():
            first = tokens.ids[token][0] - tokens.first_id
            tokens.rows[first : first + len(rows)] = rows.to(tokens.rows)
    return f"Started from the weights of an earlier training: {len(start.lora)} LoRA tensors, {len(start.embeddings)} embeddings; the optimizers start anew"


def _other_dataset(start: Checkpoint) -> str:
    return f"{start.name} was made on another data set: give the one it was made on, or leave resume_from out"


def _check_tokens(start: Weights, config: TrainConfig) -> None:
    if tuple(start.embeddings) != config.tokens:
        stored, wanted = (", ".join(tokens) or "no token" for tokens in (start.embeddings, config.tokens))
        raise ValueError(f"the weights to start from were trained with {stored}, this training has {wanted}: give the same")
    for token, rows in start.embeddings.items():
        if len(rows) != config.placeholder_vectors:
            raise ValueError(
                f"the weights to start from have {len(rows)} vectors for {token}, this training has {config.placeholder_vectors}: "
                "give the same placeholder_vectors"
            )


def _pairs(wanted: dict[str, Any], found: dict[str, Any]) -> Sequence[tuple[str, Any, Any]]:
    """Each name with both values, tuples as the lists that JSON makes of them."""
    names = list(dict.fromkeys([*wanted, *found]))
    values = ((name, wanted.get(name), found.get(name)) for name in names)
    return [(name, list(value) if isinstance(value, tuple) else value, stored) for name, value, stored in values]


def _shape(state: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None

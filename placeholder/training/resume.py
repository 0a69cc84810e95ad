"""What a training starts from when it does not start anew: a checkpoint, or the weights of an earlier training."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict

from placeholder.config import OPTIONS, TrainConfig
from placeholder.errors import quoted, shown
from placeholder.lora.adapter import ADAPTER, A, lora_state_dict
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.training.checkpoint import Checkpoint, is_checkpoint, read_checkpoint, stored_checkpoints
from placeholder.training.loop import TrainState
from placeholder.weights.archive import Weights, read_weights

Start = Checkpoint | Weights | None
PROGRESS = {"losses", "preservations", "loss", "seconds", "curve"}  # the keys of Progress.state_dict


def resume_path(source: Path) -> Path:
    """The file to start from: `source`, or the newest checkpoint of a folder. Raises ValueError where there is none."""
    if source.is_dir():
        stored = stored_checkpoints(source)
        if not stored:
            raise ValueError(f"resume_from {source} holds no checkpoint: leave it out, or name a checkpoint or a weights.zip")
        return stored[-1]
    if not source.is_file():
        raise ValueError(f"resume_from {source} does not exist: give a checkpoint, a folder of checkpoints or a weights.zip")
    return source


def read_start(path: Path) -> Checkpoint | Weights:
    """A checkpoint, or a weights archive, told apart by content. Raises ValueError for anything else."""
    return read_checkpoint(path) if is_checkpoint(path) else read_weights(path)


def resumed_config(start: Checkpoint | Weights, config: TrainConfig, facts: dict[str, Any]) -> TrainConfig:
    """The configuration to go on with: a blank seed and a blank `torch_compile` are the checkpoint's.

    `facts` are those of this training that a checkpoint has to share, such as its base model. Raises ValueError where the
    training would not be the one that was interrupted, or could not start from those weights.
    """
    if isinstance(start, Weights):
        _check_tokens(start, config)
        ranks = {len(value) for key, value in start.lora.items() if key.endswith(A)}
        if len(ranks) == 1 and ranks != {config.rank}:
            raise ValueError(f"the LoRA to start from has rank {ranks.pop()}, this training {config.rank}: give the same")
        return config
    recorded, step, progress = (start.facts.get(name) for name in ("config", "step", "progress"))
    if not (
        isinstance(recorded, dict) and isinstance(progress, dict) and progress.keys() == PROGRESS and isinstance(step, int)
    ):
        raise ValueError(f"{start.name} does not say how it was trained: resume from another checkpoint")
    for name in ("seed", "torch_compile"):
        if getattr(config, name) is None:
            config = replace(config, **{name: recorded.get(name)})
    wanted = {name: value for name, value in asdict(config).items() if not OPTIONS[name].resume_may_change} | facts
    if config.tokens and config.placeholder_warmup_fraction:  # with other steps, a LoRA that learns already would stop
        wanted["steps"] = config.steps
    for name, value in wanted.items():
        stored = start.facts.get(name) if name in facts else recorded.get(name)
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if value != stored:
            raise ValueError(
                f"{start.name} was made with {name} {shown(stored)}, this training has {shown(value)}: give the same to go on, "
                "or leave resume_from out"
            )
    if step > config.steps:
        raise ValueError(f"{start.name} has made {step} steps, this training is to make {config.steps}: give more")
    return config


def stored_descriptions(start: Start, count: int) -> list[str] | None:
    """The captions that autocaption wrote for the `count` images of a checkpoint's training; None without a checkpoint.

    Raises ValueError where it holds none, or those of another number of images.
    """
    if not isinstance(start, Checkpoint) or not count:
        return None
    found = start.facts.get("descriptions")
    if not isinstance(found, list) or not all(isinstance(description, str) for description in found):
        raise ValueError(f"{start.name} does not hold the captions it was trained with: resume from another checkpoint")
    if len(found) != count:
        raise ValueError(_other_dataset(start))
    return found


def check_dataset(start: Start, digest: str) -> None:
    """Raise ValueError where a checkpoint was made on other images, captions or crops than those of this digest."""
    if isinstance(start, Checkpoint) and start.facts.get("dataset_digest") != digest:
        raise ValueError(_other_dataset(start))


def stored_need(start: Start) -> tuple[Any, Any] | None:
    """The quantization that a checkpoint was made with, and whether its modulations were a table; None without a checkpoint."""
    if not isinstance(start, Checkpoint):
        return None
    return start.facts.get("transformer_storage"), start.facts.get("modulations_tabled")


def apply_start(start: Checkpoint | Weights, state: TrainState, tokens: PlaceholderTokens) -> str:
    """Replace the fresh LoRA and token embeddings by those of the start; returns the line that says so.

    Raises ValueError where they do not fit this training.
    """
    if isinstance(start, Checkpoint):
        try:
            state.load_state_dict(start.state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{start.name} is not a checkpoint of such a training ({error}): resume from another") from error
        return f"Resumed from {start.name} after step {state.step}"
    fresh = {key: tuple(value.shape) for key, value in lora_state_dict(state.transformer).items()}
    given = {key: tuple(value.shape) for key, value in start.lora.items()}
    if others := fresh.keys() ^ given.keys():
        raise ValueError(
            f"the LoRA to start from is on other layers than this training's, {len(others)} weights differ, among them "
            f"{quoted(min(others))}: give an archive of a training like this one, or leave resume_from out"
        )
    if wrong := sorted(key for key in fresh if fresh[key] != given[key]):
        raise ValueError(
            f"the LoRA to start from has {wrong[0]} of shape {given[wrong[0]]}, this training makes {fresh[wrong[0]]}: "
            "give an archive of a training like this one"
        )
    set_peft_model_state_dict(state.transformer, start.lora, adapter_name=ADAPTER)
    with torch.no_grad():
        for token, rows in start.embeddings.items():
            first = tokens.ids[token][0] - tokens.first_id
            tokens.rows[first : first + len(rows)] = rows.to(tokens.rows)
    started = f"{len(start.lora)} LoRA tensors, {len(start.embeddings)} embeddings; the optimizers start anew"
    warnings = "".join(f"Warning: {warning}. " for warning in start.warnings())
    return f"{warnings}Started from the weights of an earlier training: {started}"


def _other_dataset(start: Checkpoint) -> str:
    return f"{start.name} was made on another data set: give the one it was made on, or leave resume_from out"


def _check_tokens(start: Weights, config: TrainConfig) -> None:
    if tuple(start.embeddings) != config.tokens:
        for warning in start.warnings():
            raise ValueError(f"resume_from cannot be used: {warning}")
        stored, wanted = (", ".join(tokens) or "no token" for tokens in (start.embeddings, config.tokens))
        raise ValueError(f"the weights to start from were trained with {stored}, this training has {wanted}: give the same")
    for token, rows in start.embeddings.items():
        if len(rows) != config.placeholder_vectors:
            raise ValueError(
                f"the weights to start from have {len(rows)} vectors for {token}, this training has "
                f"{config.placeholder_vectors}: give the same placeholder_vectors"
            )

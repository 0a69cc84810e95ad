"""All that the next step of a training depends on, as tensors and JSON and back: a training goes on bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.training.examples import Position
from placeholder.training.loop import TrainState

POSITION = ("step", "upcoming", "generator")


def capture(train_state: TrainState, position: Position) -> tuple[dict[str, Tensor], Any]:
    """The state between two steps: its tensors, on the CPU, and the rest as JSON can hold it."""
    rows = train_state.row_optimizer
    state = {
        "step": position.step,
        "upcoming": position.upcoming,
        "generator": position.generator.get_state(),
        "lora": train_state.lora,
        "lora_optimizer": train_state.lora_optimizer.state_dict(),
        "rows": rows and rows.rows,
        "row_steps": rows and rows.steps,
        "row_optimizer": rows and rows.adamw.state_dict(),
    }
    tensors: dict[str, Tensor] = {}
    return tensors, _externalize(state, "state", tensors)


def restore(train_state: TrainState, position: Position, tensors: dict[str, Tensor], stored: Any) -> None:
    """Put a captured state in the place of the present one; raises ValueError where it is not one of such a training."""
    with _explained():
        state = _internalize(stored, tensors)
        for parameter, value in zip(train_state.lora, state["lora"], strict=True):
            _copy(parameter, value)
        train_state.lora_optimizer.load_state_dict(state["lora_optimizer"])
        if rows := train_state.row_optimizer:
            _copy(rows.rows, state["rows"])
            rows.steps = state["row_steps"]
            rows.adamw.load_state_dict(state["row_optimizer"])
    restore_position(position, tensors, stored)


def restore_position(position: Position, tensors: dict[str, Tensor], stored: Any) -> None:
    """Put the captured position alone in the place of the present one; for errors see `restore`."""
    with _explained():
        step, upcoming, generator = (_internalize(dict(stored["items"])[name], tensors) for name in POSITION)
        position.generator.set_state(generator)
        position.step, position.upcoming = step, upcoming


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint is not one of such a training ({error}): resume from another") from error


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    if value.shape != parameter.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(value)


def _externalize(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it: the tensors in it, at any depth, go into `tensors` under names that begin with `name`.

    Dictionaries become lists of pairs, because their keys may be numbers.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()  # of its own: bitsandbytes shares tables between parameters
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _externalize(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_externalize(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _internalize(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `_externalize`; tuples come back as lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]].clone()
        return {key: _internalize(item, tensors) for key, item in value["items"]}
    return [_internalize(item, tensors) for item in value] if isinstance(value, list) else value

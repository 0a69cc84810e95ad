"""What the processes of a training are told, in a JSON file, and what they tell of an error, in another beside it."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from placeholder.config import TrainConfig, train_config

ERROR_NAME = "error.json"


@dataclass(frozen=True)
class ProcessJob:
    """A training as a process of its own is told of it, by the path of a JSON file.

    `config` holds options of TrainConfig by name, `wandb` the names `project`, `run` and `entity`. `ends_with_stdin`: it ends when
    its standard input is closed, which happens when the process that started it has gone.
    """

    dataset: str
    output: str
    config: dict[str, Any]
    resume_from: str | None = None
    checkpoint_folder: str | None = None
    checkpoint_every: int | None = None
    wandb: dict[str, str | None] | None = None
    ends_with_stdin: bool = False

    @classmethod
    def read(cls, file: Path) -> "ProcessJob":
        """The job that a file holds. Raises ValueError where it is not there or holds anything else."""
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}): give a JSON file with dataset, output and config") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}: give an object with dataset, output and config")
        _refuse_unknown(file, found, {field.name for field in fields(cls)})
        if missing := {"dataset", "output", "config"} - found.keys():
            raise ValueError(f"{file} lacks {', '.join(sorted(missing))}")
        for name, kind in {"dataset": str, "output": str, "config": dict}.items():
            if not isinstance(found[name], kind):
                raise ValueError(f"{file} has {name} of the kind {type(found[name]).__name__}: give {kind.__name__}")
        wandb = found.get("wandb")
        if wandb is not None:
            if not isinstance(wandb, dict):
                raise ValueError(
                    f"{file} has wandb of the kind {type(wandb).__name__}: give an object with project, run, entity"
                )
            _refuse_unknown(file, wandb, {"project", "run", "entity"})
            found["wandb"] = dict.fromkeys(("project", "run", "entity")) | wandb
        _refuse_unknown(file, found["config"], {field.name for field in fields(TrainConfig)})
        return cls(**found)

    @property
    def train_config(self) -> TrainConfig:
        """The configuration, whose tuples JSON has made lists. Raises ValueError for a value that is not accepted."""
        if self.ends_with_stdin:  # it was checked before it was written
            return TrainConfig(
                **{name: tuple(value) if isinstance(value, list) else value for name, value in self.config.items()}
            )
        named = self.config.get("placeholder_token")
        return train_config(self.config | {"placeholder_token": ",".join(named) or None if isinstance(named, list) else named})


def _refuse_unknown(file: Path, found: dict[str, Any], known: set[str]) -> None:
    if unknown := found.keys() - known:
        raise ValueError(f"{file} has the unknown {', '.join(sorted(unknown))}: known are {', '.join(sorted(known))}")


def error_of(job: Path) -> ValueError | RuntimeError | None:
    """The first error that a process has told of."""
    told = job.with_name(ERROR_NAME)
    if not told.exists():
        return None
    found = json.loads(told.read_text())
    return (ValueError if found["kind"] == "ValueError" else RuntimeError)(found["message"])


def tell(job: Path, error: ValueError | RuntimeError, index: int) -> None:
    """Leave the error for the process that has started this one, unless another was first: what follows it is its echo."""
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    own = job.with_name(f"{index}-{ERROR_NAME}")
    own.write_text(json.dumps({"kind": kind, "message": str(error)}))
    with suppress(FileExistsError):
        os.link(own, job.with_name(ERROR_NAME))

"""One training as it is asked for: what to train on, how, and where what comes of it goes."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from placeholder.config import MAX_STEPS, TrainConfig
from placeholder.errors import shown, text, whole

CHECKPOINTS, FEWEST_STEPS = 10, 50  # a checkpoint after every tenth of the steps, but not after fewer than fifty
DEFAULT_PROJECT = "qwen-image-lora"
KEY_VARIABLE, MODE_VARIABLE, FOLDER_VARIABLE = "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"


@dataclass(frozen=True)
class WandbTarget:
    """Project, run and entity, and the key for them, which is never shown; `offline` is the folder of a run that stays here."""

    key: str | None = field(repr=False)
    project: str = DEFAULT_PROJECT
    run: str | None = None
    entity: str | None = None
    offline: Path | None = None

    @classmethod
    def of(cls, key: str | None, project: str | None, run: str | None, entity: str | None) -> "WandbTarget | None":
        """What the inputs ask for; None where all are blank. Raises ValueError for a bad name or a missing key."""
        named = {"wandb_project": project, "wandb_run": run, "wandb_entity": entity}
        named = {name: value for name, value in named.items() if value}
        if not key and not named:
            return None
        for name, value in named.items():
            if len(value) > 128 or not value.isprintable() or (name != "wandb_run" and re.search(r"[/\\#?%:]", value)):
                raise ValueError(f"{name} is {shown(value)}: give at most 128 characters, none of / \\ # ? % :")
        mode = os.environ.get(MODE_VARIABLE) or "online"
        if mode not in ("online", "offline"):
            raise ValueError(f"{MODE_VARIABLE} is {shown(mode)}: set online or offline, or leave it unset")
        if mode == "online" and not key:
            raise ValueError(
                f"{next(iter(named))} needs a wandb_api_key, unless {MODE_VARIABLE}=offline keeps the run on this machine"
            )
        folder = Path(os.environ.get(FOLDER_VARIABLE) or ".").absolute() if mode == "offline" else None
        return cls(key if folder is None else None, project or DEFAULT_PROJECT, run or None, entity or None, folder)

    def names(self) -> dict[str, str | None]:
        """What may be written down of it."""
        return {"project": self.project, "run": self.run, "entity": self.entity}

    def environment(self) -> dict[str, str]:
        """What a process that is to find the same target by its names has to be told beside them."""
        if self.offline is not None:
            return {FOLDER_VARIABLE: str(self.offline)}
        return {KEY_VARIABLE: self.key or ""}


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a training leaves its checkpoints, and after how many steps each."""

    path: Path
    every: int

    @classmethod
    def of(cls, path: str | None, every: int | None, steps: int) -> "CheckpointFolder | None":
        """The folder that the inputs ask for; None without a path. Raises ValueError for `every` without one."""
        if not path:
            if every is not None:
                raise ValueError(
                    f"checkpoint_every is {every} without a checkpoint_folder: name a folder on the training machine"
                )
            return None
        if every is None:
            every = max(FEWEST_STEPS, steps // CHECKPOINTS)
        return cls(Path(text("checkpoint_folder", path)).absolute(), whole("checkpoint_every", every, 1, MAX_STEPS))


class StoppedError(RuntimeError):
    """A training that was asked to end before its last step."""


@dataclass
class Stop:
    """A training that leaves checkpoints ends after its present step once this is `wanted`, as long as it is `heeded`."""

    wanted: bool = False
    heeded: bool = False


@dataclass(frozen=True)
class Job:
    """One training: the archive of images, the options, the weights archive to write.

    `resume_from` is a checkpoint, a folder of them, or an earlier weights archive; `tracker` a run on Weights & Biases.
    """

    dataset: Path
    config: TrainConfig
    output: Path
    resume_from: Path | None = None
    checkpoints: CheckpointFolder | None = None
    tracker: WandbTarget | None = None

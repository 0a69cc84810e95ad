"""A training as it is asked for: data set, options, output, start, checkpoints and tracker."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import SecretStr

from placeholder.config import LORA, MAX_STEPS, OPTIONS, TrainConfig, train_config
from placeholder.errors import shown
from placeholder.options import Option, Text, Whole, checked, option, options_class, options_of

CHECKPOINTS, FEWEST_STEPS = 10, 50  # a checkpoint after every tenth of the steps, but not after fewer than fifty
DEFAULT_PROJECT = "qwen-image-lora"
KEY_VARIABLE, MODE_VARIABLE, FOLDER_VARIABLE = "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"
# The headings of --help.
CHECKPOINTING, UPLOADS = "checkpoints and configuration", "Hugging Face Hub and Weights & Biases"


@options_class
class JobInputs:
    """The inputs of a training that are no options of TrainConfig: files, and where results go."""

    dataset: Annotated[Path, option(LORA)]
    """Zip or tar of images, optionally with captions in .txt files of the same names or in metadata.jsonl."""
    resume_from: Annotated[Path | None, option(CHECKPOINTING)] = None
    """Checkpoint to resume from, a folder of them for the newest, or an earlier weights.zip to start from."""
    checkpoint_folder: Annotated[Text | None, option(CHECKPOINTING)] = None
    """Folder on the training machine for checkpoints, to resume from. Blank: none are written."""
    checkpoint_every: Annotated[Whole | None, option(CHECKPOINTING, ge=1, le=MAX_STEPS)] = None
    """Steps from one checkpoint to the next. Blank: a tenth of all, at least 50. The newest two are kept."""
    hf_repo_id: Annotated[Text | None, option(UPLOADS)] = None
    """Hugging Face repository, owner/name, for the LoRA, embedding and model card. A new one is private."""
    hf_token: Annotated[SecretStr | None, option(UPLOADS)] = None
    """Token of the Hugging Face Hub with write access to hf_repo_id."""
    wandb_api_key: Annotated[SecretStr | None, option(UPLOADS)] = None
    """API key of Weights & Biases: shows losses, the norm of the token embedding and samples while it trains."""
    wandb_project: Annotated[Text | None, option(UPLOADS)] = None
    """Project on Weights & Biases. Blank: qwen-image-lora, where a key is given."""
    wandb_run: Annotated[Text | None, option(UPLOADS)] = None
    """Name of the run on Weights & Biases. Blank: chosen there."""
    wandb_entity: Annotated[Text | None, option(UPLOADS)] = None
    """User or team on Weights & Biases. Blank: the default of the key."""
    config: Annotated[Path | None, option(CHECKPOINTING)] = None
    """YAML file with the sections train, debug and model; its values override the other inputs."""


DATASET = {"dataset": options_of(JobInputs)["dataset"]}
TRAIN_INPUTS: dict[str, Option] = DATASET | OPTIONS | options_of(JobInputs)  # in the order of train.py


@dataclass(frozen=True)
class WandbTarget:
    """A run on Weights & Biases; the API key is never shown, `offline` is the folder of an offline run."""

    key: str | None = field(repr=False)
    project: str = DEFAULT_PROJECT
    run: str | None = None
    entity: str | None = None
    offline: Path | None = None

    @classmethod
    def of(cls, key: str | None, project: str | None, run: str | None, entity: str | None) -> "WandbTarget | None":
        """The run that the inputs ask for; None where all are blank. Raises ValueError for a bad name or a missing key."""
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
        """Project, run and entity: what may be written down."""
        return {"project": self.project, "run": self.run, "entity": self.entity}

    def environment(self) -> dict[str, str]:
        """The environment variables that a process needs, beside the names, for the same target."""
        if self.offline is not None:
            return {FOLDER_VARIABLE: str(self.offline)}
        return {KEY_VARIABLE: self.key or ""}


@dataclass(frozen=True)
class CheckpointFolder:
    """Where checkpoints are written, and the number of steps between them."""

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
        return cls(Path(path).absolute(), every)


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

    @classmethod
    def of(cls, inputs: dict[str, Any], output: Path) -> "Job":
        """The training that the inputs of train.py ask for, secrets given as text.

        Raises ValueError, one sentence, for any value that is not accepted.
        """
        if not inputs.get("dataset"):
            raise ValueError("dataset is missing: give a zip or tar of images")
        given = checked(JobInputs, {name: value for name, value in inputs.items() if name not in OPTIONS})
        config = train_config({name: value for name, value in inputs.items() if name in OPTIONS}, given.config)
        checkpoints = CheckpointFolder.of(given.checkpoint_folder, given.checkpoint_every, config.steps)
        key = given.wandb_api_key.get_secret_value() if given.wandb_api_key else None
        tracker = WandbTarget.of(key, given.wandb_project, given.wandb_run, given.wandb_entity)
        return cls(given.dataset, config, output, given.resume_from, checkpoints, tracker)

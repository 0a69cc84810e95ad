"""Where a run on Weights & Biases goes: read from the inputs and from WANDB_MODE and WANDB_DIR."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from placeholder.errors import shown

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

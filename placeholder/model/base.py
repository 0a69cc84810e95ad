"""The base model: its source on disk or on the hub, its device and dtype, and its components by name."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from placeholder.devices import free_bytes
from placeholder.model.download import cached_commit, fetch, split_revision

# Replicate reads progress from log lines that look like a bar; only the training's own may.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

MODEL_VARIABLE = "QWEN_IMAGE_MODEL"
DEFAULT_MODEL = "Qwen/Qwen-Image"
# The head of its main branch, 57.7 GB, since 2025; weights archives and seeds are worth what they were as long as it is this one.
DEFAULT_REVISION = "75e0b4be04f60ec59a75f475837eced720f823b6"


@dataclass(frozen=True)
class BaseModel:
    """Which base model, and where and in which dtype its components run.

    `source`: a folder, or a repository of the hub, there at `revision` (a commit, tag or branch; None for its main branch).
    """

    source: str
    device: torch.device
    dtype: torch.dtype
    revision: str | None = field(default=None, kw_only=True)

    @classmethod
    def from_environment(cls) -> "BaseModel":
        """Folder, hub id or hub id@revision from QWEN_IMAGE_MODEL; bf16 on CUDA, fp32 on a CPU, which only a small model fits.

        Raises ValueError for a malformed revision, and when the full-size model is asked for and there is no CUDA GPU.
        """
        source, revision = split_revision(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
        if source == DEFAULT_MODEL:
            revision = revision or DEFAULT_REVISION
        if torch.cuda.is_available():
            return cls(source, torch.device("cuda"), torch.bfloat16, revision=revision)
        if source == DEFAULT_MODEL:
            raise ValueError(
                f"no CUDA GPU was found and {DEFAULT_MODEL} needs one: run on a GPU, or name a small model in {MODEL_VARIABLE}"
            )
        return cls(source, torch.device("cpu"), torch.float32, revision=revision)

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository that is loaded; None for a folder, and before anything was fetched."""
        return cached_commit(self.source, self.revision)

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on the device."""
        return free_bytes(self.device)

    def fetch(self, log: Callable[[str], None]) -> None:
        """Have all files at hand before the first is read, fetched side by side from the hub where the source is not a folder."""
        fetch(self.source, log, revision=self.revision)

    def component(self, kind: type, name: str, **options: Any) -> Any:
        """A component of the class `kind` from the base model's subfolder `name`, on the CPU."""
        return kind.from_pretrained(self.source, subfolder=name, **self._pinned(), **options)

    def configuration(self, kind: type, name: str) -> Any:
        """The configuration of a component: a dictionary for a diffusers class, the object for one of transformers."""
        read = kind.load_config if issubclass(kind, ConfigMixin) else kind.from_pretrained
        return read(self.source, subfolder=name, **self._pinned())

    def _pinned(self) -> dict[str, str]:
        """The commit that was fetched, so that all components are of one, also where the branch moves meanwhile."""
        revision = self.commit or self.revision
        return {"revision": revision} if revision else {}

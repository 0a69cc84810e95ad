"""Small images, datasets, archives and trainings for the tests."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.model.base import BaseModel
from placeholder.training.memory_plan import Plan, plan_memory


@dataclass(frozen=True)
class WithoutWeights(BaseModel):
    """A base model of which everything but the weights can be read."""

    def component(self, kind: type, name: str, **options: Any) -> Any:
        """The tokenizer or the scheduler."""
        assert name in ("tokenizer", "scheduler"), f"the weights of the {name} were loaded"
        return super().component(kind, name, **options)


@dataclass(frozen=True)
class Run:
    """A training: its archive, what it returned, and what it logged."""

    config: TrainConfig
    archive: Path
    meta: dict[str, Any]
    log: list[str]

    def entry(self, name: str) -> bytes:
        """A file of the archive."""
        with zipfile.ZipFile(self.archive) as opened:
            return opened.read(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of the archive."""
        return load(self.entry(name))


def train(dataset: Path, config: TrainConfig, output: Path, base: BaseModel, planned: Callable[..., Plan] = plan_memory) -> Run:
    """A whole training, with its log kept."""
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("placeholder.training.setup.plan_memory", planned)
        meta = finetune(Job(dataset, config, output), base, log.append)
    return Run(config, output, meta, log)


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """An image of a few large soft patches of color."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The image as the content of a file."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    """A zip of the entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, entries: dict[str, bytes], mode: str = "w") -> Path:
    """A tar of the entries."""
    with tarfile.open(path, mode) as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def read_zip(path: Path) -> dict[str, bytes]:
    """The entries of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_dataset(path: Path, captions: list[str | None]) -> Path:
    """A dataset of one image for each caption, None for none; every other image is wider than high."""
    entries = {}
    for number, caption in enumerate(captions):
        entries[f"{number}.png"] = encoded(picture(96 if number % 2 else 64, 64, seed=number))
        if caption is not None:
            entries[f"{number}.txt"] = caption.encode()
    return write_zip(path, entries)

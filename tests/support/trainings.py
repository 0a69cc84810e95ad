"""A training as a process of its own, like a child of launch.py, for tests that send it signals; running processes."""

import os
import subprocess
from pathlib import Path

import psutil

from demo.server import ROOT
from placeholder.config import config_yaml
from placeholder.job import Job
from placeholder.model.base import MODEL_VARIABLE
from placeholder.service import launch
from placeholder.service.worker import ERROR_VARIABLE


def children() -> list[psutil.Process]:
    """Every process that this one has started, however far down, and that still runs."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def child_training(job: Job, base_model: str, folder: Path, **environment: str) -> subprocess.Popen:
    """The training with its log on a pipe; it ends when its standard input is closed. Its files lie in `folder`."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(config_yaml(job.config), encoding="utf-8")
    return subprocess.Popen(
        launch.command(job, config, 1),
        cwd=ROOT,
        env=os.environ | {MODEL_VARIABLE: base_model, ERROR_VARIABLE: str(folder / "error.json")} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

"""What the tests share: the small base model, its tokenizer, a data set, and one trained archive of each mode."""

import gc
import os

# Before torch is imported: one thread, since the small base model is too small to share; and no look-ups on a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder, load_tokenizer
from placeholder.weights.archive import LORA_NAME
from standin.small_base import build_small_base, build_tiny_base
from tests.support.samples import Run, train, write_dataset
from tests.support.serving import serving
from tests.support.vision_base import build_vision_base

torch.set_num_threads(1)
gc.freeze()  # what was imported stays: trainings collect garbage several times, and would look through it each time


@pytest.fixture(scope="session")
def base() -> BaseModel:
    """An untrained base model, the smallest of its classes: enough to see that every part does what it should."""
    folder = build_tiny_base(ROOT / ".cache" / "tiny-base")
    return BaseModel(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def small_base() -> BaseModel:
    """The trained base model of the demo, which draws."""
    return BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def vision_base(base, tmp_path_factory) -> BaseModel:
    """The untrained base model with a text encoder that sees."""
    folder = build_vision_base(tmp_path_factory.mktemp("base") / "seeing", Path(base.source))
    return BaseModel(str(folder), base.device, base.dtype)


@pytest.fixture(scope="session")
def tokenizer(base):
    """The real vocabulary. Nothing in the package may change it, so the whole session shares one."""
    loaded = load_tokenizer(base)
    yield loaded
    assert len(loaded) == 151665


@pytest.fixture(scope="session")
def text_encoder(base):
    """The small text encoder. Nothing in the package may change it, so the whole session shares one."""
    loaded = load_text_encoder(base)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    yield loaded
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Three images of two shapes; the captions of two name <zwx>, the third has none."""
    captions = ["a photo of <zwx>", "<zwx> in a garden", None]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset.zip", captions)


SHORT = {"steps": 15, "rank": 4, "resolution": (64,), "learning_rate": 1e-2, "seed": 1, "report": False}


@pytest.fixture(scope="session")
def zero_prior(base, dataset, tmp_path_factory) -> Run:
    """A training with the token <zwx>."""
    token = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",), "prior_preservation": 4.0}
    config = TrainConfig(**SHORT, **token, log_prompt_ids=True)
    return train(dataset, config, tmp_path_factory.mktemp("zero_prior") / "zero-prior.zip", base)


@pytest.fixture(scope="session")
def style(zero_prior, tmp_path_factory) -> Path:
    """That training's LoRA alone."""
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    path.write_bytes(zero_prior.entry(LORA_NAME))
    return path


@pytest.fixture(scope="session")
def baseline(base, dataset, tmp_path_factory) -> Run:
    """A training without the token, although one is named."""
    config = TrainConfig(**SHORT, train_placeholder_token=False, placeholder_token=("<zwx>",), prior_preservation=4.0)
    return train(dataset, config, tmp_path_factory.mktemp("baseline") / "baseline.zip", base)


@pytest.fixture
def site(tmp_path):
    """A web server on this machine: its address and its folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    with serving(partial(SimpleHTTPRequestHandler, directory=folder)) as address:
        yield address, folder


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The place of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder

"""The base model: the description of Qwen-Image, which one the environment names, and how its components are loaded."""

import subprocess
import sys

import pytest
import torch

from demo.server import ROOT
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_transformer, load_vae
from tests.support.samples import write_dataset


def test_everything_is_loaded_frozen_and_the_vocabulary_is_not_resized(base, text_encoder):
    for module in (text_encoder, load_vae(base, torch.float32), load_transformer(base)):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert text_encoder.embed_tokens.weight.shape == (152064, 32)
    assert not hasattr(text_encoder, "lm_head")
    assert not any("visual" in name for name, _ in text_encoder.named_modules())


def test_the_base_model_is_the_one_that_the_environment_names(monkeypatch, tmp_path):
    def found(name: str | None, cuda: bool = True) -> BaseModel:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
        monkeypatch.setenv("QWEN_IMAGE_MODEL", name) if name is not None else monkeypatch.delenv("QWEN_IMAGE_MODEL")
        return BaseModel.from_environment()

    assert found("some/folder", cuda=False) == BaseModel("some/folder", torch.device("cpu"), torch.float32)
    assert found("some/folder") == BaseModel("some/folder", torch.device("cuda"), torch.bfloat16)
    for blank in ("", None):
        assert found(blank) == found("Qwen/Qwen-Image")
    for published in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"):
        assert (found(published).source, found(published).revision) == (published, QWEN_IMAGE.published[published].revision)
    assert found("Qwen/Qwen-Image@main").revision == "main"
    for revision in ("v1.0", "refs/pr/7", "0123456789abcdef0123456789abcdef01234567"):
        assert (found(f"some/model@{revision}").source, found(f"some/model@{revision}").revision) == ("some/model", revision)
    folder = tmp_path / "base@home"
    folder.mkdir()
    with pytest.raises(
        ValueError, match=r"base@home' is a folder without model_index\.json: give one that diffusers has saved"
    ):
        found(str(folder))
    (folder / "model_index.json").touch()
    assert found(str(folder)).source == str(folder)


@pytest.mark.parametrize(
    "name", ["some/model@", "some/model@a b", "some/model@../x", "some/model@-x", "@v1", "a/b/c@v1", "a/b@c@d", "/nope", "nope"]
)
def test_a_malformed_revision_gets_its_sentence(name, monkeypatch):
    monkeypatch.setenv("QWEN_IMAGE_MODEL", name)
    with pytest.raises(ValueError, match="is not a folder and not owner/name or owner/name@revision: give a commit"):
        BaseModel.from_environment()


def test_a_gpu_without_bfloat16_gets_its_sentence(monkeypatch):
    answers = {"is_available": True, "is_bf16_supported": False, "get_device_name": "Tesla T4"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **_: answer)
    with pytest.raises(ValueError, match="Tesla T4 cannot compute in bfloat16: run on a GPU of compute capability 8"):
        BaseModel.from_environment()


@pytest.mark.parametrize("published", QWEN_IMAGE.published)
def test_the_full_size_model_without_a_gpu_gets_its_sentence(published, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("QWEN_IMAGE_MODEL", published)
    with pytest.raises(ValueError, match=f"no CUDA GPU was found and {published} needs one: run on a GPU, or name a small"):
        BaseModel.from_environment()


TRAINING = """
import sys
sys.modules["torchao"] = None  # none of our requirements; diffusers imports it, with warnings, wherever it is installed
from pathlib import Path
import torch
import placeholder.generate
from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.model.base import BaseModel
config = TrainConfig(steps=2, rank=4, resolution=(64,), seed=0, report=False, quantize=True)
base = BaseModel(sys.argv[1], torch.device("cpu"), torch.float32)
finetune(Job(Path(sys.argv[2]), config, Path(sys.argv[3])), base)
"""


def test_the_libraries_print_nothing_when_imported_and_in_a_training(base, tmp_path):
    data = write_dataset(tmp_path / "data.zip", ["a photo"])
    command = [sys.executable, "-c", TRAINING, base.source, data, tmp_path / "w.zip"]
    ran = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Weights archive verified" in ran.stdout and "arning" not in ran.stdout

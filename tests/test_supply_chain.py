"""What comes from outside: pinned packages with hashes, and base model and archive files that cannot hold code."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from demo.server import ROOT

FOLDERS = ("placeholder", "comfyui")
SOURCES = [ROOT / "predict.py", ROOT / "train.py", *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py")))]
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
WITHOUT_WEIGHTS = {"QWEN_IMAGE.tokenizer", "QWEN_IMAGE.scheduler"}  # read from JSON and text


def pins(text: str) -> dict[str, str]:
    """Versions by package of a requirements file."""
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s\\]+)", text, re.MULTILINE))


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("file", [".dockerignore", ".gitignore"])
def test_what_a_user_keeps_beside_the_package_gets_into_no_image_and_no_commit(file):
    lines = (ROOT / file).read_text().splitlines()
    assert not {"weights", "checkpoints"} & {*lines}  # without a / placeholder/weights would match, too
    patterns = [line.strip("/") for line in lines]
    for name in ("d.zip", "weights.zip", "lora.safetensors", "image.png", "weights", "answer.json", "checkpoints", "wandb"):
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    assert not any(fnmatch(name, pattern) for name in ("placeholder", "predict.py") for pattern in patterns)


def test_every_requirement_stands_in_the_lock_with_its_version(lock):
    required = pins((ROOT / "requirements.txt").read_text())
    assert len(required) >= 14
    assert required.items() <= pins(lock).items()


def test_every_package_of_the_lock_has_a_hash_and_no_index_is_named(lock):
    entries = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)
    entries = [entry for entry in entries if entry.strip()]
    assert len(entries) == len(pins(lock))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry.split()[0]
    assert not re.search(r"://|--(extra-)?index|--find-links| @ ", lock)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_runs_what_it_is_given(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
            assert not (node.module == "torch" and {name.name for name in node.names} & {"load"})
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS | {"torch.load", "yaml.load"}
            assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}


def test_weights_of_the_base_model_are_read_from_safetensors_alone():
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "component":
                found.add((ast.unparse(node.args[0]), "use_safetensors=True" in ast.unparse(node)))
    kinds = {f"QWEN_IMAGE.{name}" for name in ("transformer", "text_encoder", "vae")}
    assert found == {(kind, True) for kind in kinds} | {(kind, False) for kind in WITHOUT_WEIGHTS}


def test_models_are_read_in_one_place():
    calls = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert calls == {"base.py"}

"""The whole job through the real Cog server: a training, pictures from its archive, and bad requests."""

import io
import json
import random
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from checks.cancels import READY_SECONDS, cancel_at
from demo.server import CogServer, data_url, from_data_url
from tests.support import hosted
from tests.support.samples import read_zip, write_zip
from tests.support.stock import stock_picture

PICTURE = {"steps": 6, "guidance": 4, "width": 64, "height": 64, "seed": 7, "output_format": "png", "token_gate": False}
TRAINING = {"steps": 15, "rank": 4, "resolution": "64", "learning_rate": 1e-2, "seed": 3, "report": False}
TRAINING |= {"log_prompt_ids": True}


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """Where the servers keep their temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def start(base, temporary, tmp_path_factory):
    """Starts a server in a mode, with more environment where it is given."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    return lambda mode, **more: CogServer(mode, {"QWEN_IMAGE_MODEL": base.source, "TMPDIR": str(temporary), **more}, log)


@pytest.fixture(scope="module")
def training_server(start):
    with start("train") as server:
        yield server


@pytest.fixture(scope="module")
def prediction_server(start):
    with start("predict") as server:
        yield server


@pytest.fixture(scope="module")
def training(training_server, dataset) -> dict:
    """The server's answer to a training with a token."""
    return training_server.ask({"dataset": data_url(dataset), **TRAINING, "placeholder_token": "<zwx>", "report": True})


@pytest.fixture(scope="module")
def archive(training, tmp_path_factory) -> Path:
    """The archive of that training."""
    assert training["status"] == "succeeded", training
    path = tmp_path_factory.mktemp("weights") / "weights.zip"
    path.write_bytes(from_data_url(training["output"]["weights"]))
    return path


def drawn(answer: dict) -> np.ndarray:
    """The picture of an answer."""
    assert answer["status"] == "succeeded", answer
    assert answer["metrics"]["image_output_count"] == 1
    return np.asarray(Image.open(io.BytesIO(from_data_url(answer["output"]))))


def ours(temporary: Path, mode: str) -> set[str]:
    """What our code keeps among the temporary files, in trainings or in predictions."""
    return {path.name for path in temporary.iterdir() if path.name.startswith(f"placeholder-{mode}-")}


def test_a_training_returns_the_archive_and_logs_what_happened(training, archive, base):
    for line in (
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Gradient mask active: only token 151665 receives updates",
        "Prompt 'a photo of <zwx>' tokenized to: [64, 6548, 315, 220, 151665]",
    ):
        assert training["logs"].splitlines().count(line) == 1
    assert "100%|##########| 15/15 [" in training["logs"]
    entries = read_zip(archive)
    assert list(entries)[:3] == ["embeddings/zwx.safetensors", "lora/lora_weights.safetensors", "meta.json"]
    assert all(name.startswith("report/") for name in list(entries)[3:])
    assert {"report/index.html", "report/grid.jpg", "report/curve.png", "report/config.yaml"} <= set(entries)
    assert training["metrics"]["training_step_count"] == 15
    meta = json.loads(entries["meta.json"])
    assert (meta["training_mode"], meta["seed"], meta["base_model"]) == ("zero_prior", 3, base.source)


def test_a_prediction_equals_stock_diffusers_with_the_row_written_into_the_matrix(prediction_server, archive, base):
    prompt, shared = "a portrait of <zwx> in golden hour light", {"negative_prompt": "blurry, low quality", "lora_scale": 1.2}
    options = PICTURE | shared | {"num_inference_steps": 5, "guidance_scale": 4.5, "replicate_weights": data_url(archive)}
    found = drawn(prediction_server.ask({"prompt": prompt, **options}))
    expected = stock_picture(base.source, prompt, archive, **shared, steps=5, guidance=4.5)
    assert np.abs(found.astype(int) - expected).max() <= 1  # ours adds the LoRA in one operation, which rounds otherwise


def test_a_prediction_whose_prompt_does_not_name_the_token_is_the_base_models(prediction_server, archive, base):
    inputs = {name: value for name, value in PICTURE.items() if name != "token_gate"} | {"prompt": "a garden at noon"}
    answer = prediction_server.ask({**inputs, "replicate_weights": data_url(archive)})
    assert np.array_equal(drawn(answer), stock_picture(base.source, "a garden at noon"))
    line = (
        "Warning: the prompt does not name <zwx>, so its LoRA is off: put the token into the prompt, or set token_gate to false"
    )
    assert line in answer["logs"].splitlines()


def training_processes(server: CogServer) -> list[psutil.Process]:
    """The processes of a training, which the server's worker starts."""
    return [child for child in psutil.Process(server.process.pid).children(recursive=True) if "--overwrite" in child.cmdline()]


def test_cancels_at_random_moments_are_never_lost(training_server, dataset, temporary):
    inputs = {"dataset": data_url(dataset), **TRAINING, "placeholder_token": "<zwx>", "steps": 20000}
    moments = random.Random(0)
    found = cancel_at([7 * moments.random() ** 2 for _ in range(8)], training_server, inputs)
    assert found.facts()["lost"] == 0 and len(found.seconds) == 8
    assert max(found.seconds) < 5 * READY_SECONDS  # other tests run beside this one; make cancels holds it to two seconds
    assert training_processes(training_server) == []
    assert ours(temporary, "training") | ours(temporary, "job") == set()


def test_a_training_process_that_is_killed_is_one_sentence_and_the_server_is_ready(training_server, dataset):
    sentence = "the training process was killed, most likely out of memory: give a smaller resolution or batch_size"
    before = training_server.log.stat().st_size
    training_server.start("dies", {"dataset": data_url(dataset), **TRAINING, "steps": 20000})
    deadline = time.monotonic() + 60
    while not (started := training_processes(training_server)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started[0].kill()
    training_server.wait_until_ready()
    assert sentence in training_server.log.read_text()[before:]


def test_a_training_after_all_these_is_as_if_they_had_not_been(training_server, dataset, archive, tmp_path):
    answer = training_server.ask({"dataset": data_url(dataset), **TRAINING, "placeholder_token": "<zwx>", "report": True})
    assert answer["status"] == "succeeded", answer
    again = tmp_path / "weights.zip"
    again.write_bytes(from_data_url(answer["output"]["weights"]))
    first, second = read_zip(archive), read_zip(again)
    trained = [name for name in first if name.endswith((".safetensors", ".jpg"))]
    assert len(trained) > 2 and first.keys() == second.keys()
    assert all(first[name] == second[name] for name in trained)


def test_bad_trainings_fail_with_their_sentence_and_leave_nothing(training_server, dataset, temporary, tmp_path):
    junk, config = tmp_path / "junk.zip", tmp_path / "config.yaml"
    junk.write_bytes(b"no archive")
    config.write_text("train:\n  stepz: 5\n")
    good = {"dataset": data_url(dataset), **TRAINING}
    for inputs, sentence in (
        ({**good, "resolution": "big"}, "resolution is 'big': give whole numbers from 64 to 2048"),
        ({**good, "placeholder_token": "a b"}, "placeholder_token 'a b' is empty or holds white space"),
        ({**good, "config": data_url(config)}, "config has an unknown key train.stepz: known are train: steps"),
        ({**good, "dataset": data_url(junk)}, "is neither a zip nor a tar archive: pack the files as a zip"),
    ):
        answer = training_server.ask(inputs)
        assert answer["status"] == "failed", (inputs, answer)
        assert sentence in answer["error"]
        assert "Traceback" not in answer["error"]
    assert ours(temporary, "training") == set()


def test_bad_predictions_fail_with_their_sentence_and_leave_nothing(prediction_server, archive, temporary, tmp_path):
    entries = read_zip(archive)
    no_lora = write_zip(tmp_path / "no-lora.zip", {"meta.json": entries["meta.json"]})
    no_row = write_zip(tmp_path / "no-row.zip", {name: c for name, c in entries.items() if "embeddings" not in name})
    junk = tmp_path / "junk.zip"
    junk.write_bytes(b"no archive")
    good = {"prompt": "a photo of <zwx>", **PICTURE}
    for inputs, sentence in (
        ({**good, "prompt": " "}, "prompt is empty: describe the image"),
        ({"prompt": "a cat", "width": 64}, "width is 64 and height is None: give both"),
        ({**good, "replicate_weights": data_url(no_row)}, "the learned embedding of '<zwx>' was not found in"),
        ({**good, "replicate_weights": data_url(junk)}, "is neither a zip nor a tar archive"),
        ({**good, "replicate_weights": data_url(no_lora)}, "expected lora/lora_weights.safetensors"),
    ):
        answer = prediction_server.ask(inputs)
        assert answer["status"] == "failed", (inputs, answer)
        assert sentence in answer["error"]
    assert "LoRA weights not found in " in answer["error"]
    assert ours(temporary, "prediction") == set()


def test_the_weights_of_the_environment_serve_requests_that_bring_none(start, archive, base, zero_prior):
    with start("predict", COG_WEIGHTS=str(archive)) as server:
        inputs = {"prompt": "a photo of <zwx>", **PICTURE}
        served = drawn(server.ask(inputs))
        other = drawn(server.ask({**inputs, "replicate_weights": data_url(zero_prior.archive)}))
        again = drawn(server.ask(inputs))
    expected = stock_picture(base.source, "a photo of <zwx>", archive)
    assert np.array_equal(served, expected)
    assert np.array_equal(again, expected)
    assert not np.array_equal(other, expected)


def test_a_training_that_gives_every_input_of_the_hosted_trainer_runs_unchanged(training_server, dataset, tmp_path):
    fewest = {"steps": hosted.TRAIN_INPUTS["steps"][2][0], "seed": 42}  # the others as the hosted trainer has them
    inputs = {"dataset": data_url(dataset), **hosted.defaults(hosted.TRAIN_INPUTS), **fewest}
    assert inputs.keys() == hosted.TRAIN_INPUTS.keys()
    answer = training_server.ask(inputs)
    assert answer["status"] == "succeeded", answer
    path = tmp_path / "weights.zip"
    path.write_bytes(from_data_url(answer["output"]["weights"]))
    meta = json.loads(read_zip(path)["meta.json"])
    assert (meta["steps"], meta["rank"], meta["seed"], meta["training_mode"]) == (100, 64, 42, "baseline")


def test_a_prediction_that_gives_every_input_of_the_hosted_model_runs_unchanged(prediction_server, archive):
    small = {"width": 512, "height": 512, "num_inference_steps": 4, "seed": 7}  # the smallest size that the hosted model takes
    inputs = {
        "prompt": "a photo of <zwx>",
        "replicate_weights": data_url(archive),
        **hosted.defaults(hosted.PREDICT_INPUTS),
        **small,
    }
    assert inputs.keys() == hosted.PREDICT_INPUTS.keys()
    answer = prediction_server.ask(inputs)
    assert answer["status"] == "succeeded", answer
    image = Image.open(io.BytesIO(from_data_url(answer["output"])))
    assert (image.format, image.size) == ("WEBP", (512, 512))
    assert "4/4 [" in answer["logs"]

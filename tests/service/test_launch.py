"""Training in several processes: the same result as in one, lines in the log, nothing left behind."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from demo.server import ROOT, CogServer, data_url, from_data_url
from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.job import WandbTarget
from placeholder.model.base import MODEL_VARIABLE
from placeholder.report.wandb_run import URL_VARIABLE
from placeholder.service import launch
from placeholder.service.job import error_of, tell
from placeholder.service.launch import finetune_on_all_gpus, wanted_processes
from placeholder.weights.archive import read_weights
from tests.support.parallel_steps import CONFIG, trained
from tests.support.samples import read_zip, write_dataset
from tests.support.wandb_server import wandb_server

SHORT = TrainConfig(
    steps=15,
    rank=4,
    resolution=(64,),
    learning_rate=1e-2,
    seed=1,
    train_placeholder_token=True,
    placeholder_token=("<zwx>",),
    report=False,
)


@pytest.fixture
def two_processes(base, monkeypatch):
    """Trainings run in two processes, on the small base model."""
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, "2")
    monkeypatch.setenv(MODEL_VARIABLE, base.source)


def children() -> list[psutil.Process]:
    """Every process that this one has started, however far down, and that still runs."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def parallel(base, dataset, tmp_path_factory) -> Path:
    """What two processes of tests/parallel_steps.py have left."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={os.devnull}"]
    arguments = ["-m", "tests.support.parallel_steps", str(dataset), base.source, str(folder)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, timeout=120)
    return folder


def test_two_processes_train_what_one_trains_with_twice_the_batch(parallel, base, dataset):
    first, second = (load_file(parallel / f"{index}.safetensors") for index in (0, 1))
    alone = trained(dataset, replace(CONFIG, batch_size=2), base, Processes())
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=0)
    once = trained(dataset, CONFIG, base, Processes())
    assert (once["rows"] - alone["rows"]).abs().max() > 1e-4  # so that equal is not what anything would be


def test_a_step_that_one_process_runs_out_of_memory_in_is_made_again_by_both(parallel):
    plain = load_file(parallel / "0.safetensors")
    for index in (0, 1):
        again = load_file(parallel / f"again-{index}.safetensors")
        assert again["checkpointed"].tolist() == [0, 0, 0] + [1] * 17
        assert all(torch.equal(value, plain[name]) for name, value in again.items() if name != "checkpointed")


def test_where_one_process_can_spare_no_more_memory_both_say_so(parallel):
    first, second = (json.loads((parallel / f"{index}.json").read_text()) for index in (0, 1))
    assert first["every time"] == "OutOfMemoryError: out of memory in another process, with every block checkpointed"
    assert second["every time"] == "OutOfMemoryError: CUDA out of memory"
    assert first["exchange"] == "OutOfMemoryError: out of memory for the exchange of gradients, in another process"
    assert second["exchange"] == "OutOfMemoryError: CUDA out of memory"


def test_what_the_processes_were_given_has_to_be_the_same(parallel):
    for index in (0, 1):
        told = json.loads((parallel / f"{index}.json").read_text())
        assert told["same"] == "nothing"
        assert told["other"].startswith(
            "ValueError: process 1 of this training has a data set other than process 0: give every"
        )
        assert told["numbers"] == [0, 1, 0, 1]


def test_the_archive_is_written_once_with_one_drawn_seed_and_the_lines_reach_the_log(two_processes, dataset, tmp_path):
    log: list[str] = []
    before = children()
    finetune_on_all_gpus(dataset, replace(SHORT, seed=None), tmp_path / "weights.zip", log.append)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.zip"]
    weights = read_weights(tmp_path / "weights.zip")
    assert weights.meta["processes"] == 2 and weights.embeddings["<zwx>"].any()
    assert [line for line in log if line.startswith("Seed: ")] == [f"Seed: {weights.meta['seed']} (drawn)"]
    assert sum("100%|##########| 15/15 [" in line for line in log) == 1
    assert sum(line.startswith("Weights archive proved") for line in log) == 1
    assert children() == before


def test_what_the_user_did_wrong_is_the_same_sentence_as_in_one_process(two_processes, tmp_path):
    empty = write_dataset(tmp_path / "empty.zip", [])
    log: list[str] = []
    with pytest.raises(ValueError, match="the data set holds no usable image"):
        finetune_on_all_gpus(empty, SHORT, tmp_path / "weights.zip", log.append)
    assert not any("Traceback" in line for line in log)
    assert not (tmp_path / "weights.zip").exists()


def test_a_training_that_fails_in_the_processes_fails_here(two_processes, dataset, tmp_path):
    before = children()
    with pytest.raises(RuntimeError, match="the loss became nan by step"):
        broken = replace(SHORT, placeholder_init_std=float("nan"))
        finetune_on_all_gpus(dataset, broken, tmp_path / "weights.zip", lambda line: None)
    assert children() == before


def test_a_cancelled_training_ends_its_processes_and_the_one_run_on_wandb(two_processes, dataset, tmp_path, monkeypatch):
    before, log, key = children(), [], "0123456789" * 4

    def cancelled(line: str) -> None:
        log.append(line)
        if " 10/1000 [" in line:
            assert len(children()) >= len(before) + 3  # the launcher and two trainings
            (job,) = Path(folder).glob("placeholder-job-*/job.json")
            assert "subjects" in job.read_text() and key not in job.read_text()
            raise KeyboardInterrupt

    with wandb_server(key) as server, tempfile.TemporaryDirectory(prefix="w") as folder:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(KeyboardInterrupt):
            target = WandbTarget.of(key, "subjects", "named", None)
            finetune_on_all_gpus(dataset, replace(SHORT, steps=1000), tmp_path / "weights.zip", cancelled, target=target)
        assert not list(Path(folder).glob("placeholder-*"))
    assert children() == before
    assert not (tmp_path / "weights.zip").exists()
    assert len({run["name"] for run in server.runs}) == 1
    assert server.lines["wandb-history.jsonl"][0]["_step"] == 1
    assert server.exit_codes == [1]
    assert not any(key in line for line in log)


def test_the_first_error_is_the_one_that_counts(tmp_path):
    job = tmp_path / "job.json"
    assert error_of(job) is None
    tell(job, torch.OutOfMemoryError("CUDA out of memory"), 1)
    tell(job, ValueError("an echo"), 0)
    found = error_of(job)
    assert type(found) is RuntimeError and str(found) == "CUDA out of memory"


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("8", 8), ("", None)])
def test_the_number_of_processes_is_the_variables_or_that_of_the_gpus(value, count, monkeypatch):
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, value)
    assert wanted_processes() == (count or max(1, torch.cuda.device_count()))


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_any_other_number_of_processes_gets_its_sentence(value, monkeypatch):
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, value)
    with pytest.raises(ValueError, match=f"TRAINING_PROCESSES is '{value}': give a whole number from 1"):
        wanted_processes()


def trainers(server: CogServer) -> list[float]:
    """Seconds of work that each training process below the server's has done, the launcher's among them."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "placeholder.service.launch" in child.cmdline():
                found.append(child.cpu_times().user)
    return found


def wait_for(condition) -> float:
    """Seconds until the condition holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 180
        time.sleep(0.05)
    return time.monotonic() - start


def test_a_cancel_through_the_server_ends_the_processes_and_the_next_training_uses_as_many(base, dataset, tmp_path):
    env = {MODEL_VARIABLE: base.source, launch.PROCESSES_VARIABLE: "2"}
    inputs = {"dataset": data_url(dataset), "rank": 4, "resolution": "64", "seed": 1}
    with CogServer("train", env, tmp_path / "server.log") as server:
        server.start("long", inputs | {"steps": 20000, "report": False})
        wait_for(lambda: len(trainers(server)) == 3 and sorted(trainers(server))[1] > 8)  # imported, and well under way
        server.cancel("long")
        assert wait_for(lambda: not trainers(server)) < 10
        answer = server.ask(inputs | {"steps": 15, "learning_rate": 1e-2, "sample_every": 10})
    assert answer["status"] == "succeeded", answer
    assert "100%|##########| 15/15 [" in answer["logs"]
    archive = Path(tmp_path / "weights.zip")
    archive.write_bytes(from_data_url(answer["output"]["weights"]))
    assert read_weights(archive).meta["processes"] == 2
    assert {"report/index.html", "report/samples/step-000010-1.jpg"} <= set(read_zip(archive))
    assert answer["logs"].count("Samples of step 10: 1 drawn") == 1

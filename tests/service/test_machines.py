"""Training on several machines: accelerate launch on each, in a folder of its own with files of its own."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.distributed import LostProcessError, Processes, _together
from placeholder.finetune import finetune
from placeholder.model.base import MODEL_VARIABLE
from placeholder.service.job import ProcessJob
from placeholder.service.worker import LAUNCHER_VARIABLE, Ending
from placeholder.weights.archive import read_weights
from tests.conftest import SHORT

CONFIG = TrainConfig(**SHORT | {"steps": 8}, train_placeholder_token=True, placeholder_token=("<zwx>",))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machine:
    """A folder with a data set, a base model and a job, in which one process of a training of two runs."""

    def __init__(self, folder: Path, dataset: Path, base, config: TrainConfig):
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(parents=True)
        shutil.copy(dataset, folder / "dataset.zip")
        shutil.copytree(base.source, folder / "base")
        (folder / "job.json").write_text(
            json.dumps({"dataset": "dataset.zip", "output": "weights.zip", "config": asdict(config)})
        )
        self.before = self.files()

    def start(self, arguments: list[str], **environment: str) -> None:
        """Start a command here."""
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), MODEL_VARIABLE: "base"}
        self.output = (self.folder / "log").open("w+")
        self.process = subprocess.Popen(
            arguments, cwd=self.folder, env=os.environ | environment, stdout=self.output, stderr=subprocess.STDOUT
        )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def files(self) -> set[str]:
        """All files and folders, apart from what PyTorch makes for its compiler when it is imported."""
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {name for name in found if "torchinductor" not in name}


@pytest.fixture
def machines(base, dataset, tmp_path):
    """Makes two machines for a configuration; none of their processes is left afterwards."""
    made: list[Machine] = []

    def make(config: TrainConfig) -> list[Machine]:
        made.extend(Machine(tmp_path / name, dataset, base, config) for name in ("first", "second"))
        return made

    yield make
    for machine in made:
        if machine.process.poll() is None:
            machine.process.kill()
        machine.process.wait()
        machine.output.close()


def test_two_machines_train_what_one_process_trains_with_the_batch_of_both(machines, base, dataset, tmp_path):
    port = free_port()
    both = machines(CONFIG)
    for rank, machine in enumerate(both):
        options = ["--num_machines=2", "--num_processes=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1"]
        options += [f"--main_process_port={port}", f"--log_dir={os.devnull}", "-m", "placeholder.service.launch", "job.json"]
        machine.start([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options])
    assert [machine.process.wait(120) for machine in both] == [0, 0], both[0].log + both[1].log
    first, second = both
    assert first.files() - first.before == {"log", "weights.zip"}
    assert second.files() - second.before == {"log"}
    assert "Weights archive proved" in first.log and "Weights archive proved" not in second.log
    weights = read_weights(first.folder / "weights.zip")
    assert weights.meta["processes"] == 2
    finetune(dataset, replace(CONFIG, batch_size=2), tmp_path / "alone.zip", base, lambda line: None)
    alone = read_weights(tmp_path / "alone.zip")
    assert alone.lora.keys() == weights.lora.keys()
    for name, value in alone.lora.items():
        torch.testing.assert_close(weights.lora[name], value, atol=1e-5, rtol=torch.finfo(value.dtype).eps)  # rounded to bf16
    torch.testing.assert_close(weights.embeddings["<zwx>"], alone.embeddings["<zwx>"], atol=1e-5, rtol=0)
    assert any(value.abs().max() > 1e-3 for value in weights.lora.values())


JOINS = "import time; from placeholder.distributed import Processes; Processes.from_environment(); print('joined', flush=True); time.sleep(120)"


def test_when_one_machine_has_gone_the_other_says_so_and_ends(machines):
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = machines(CONFIG)
    first.start(
        [sys.executable, "-m", "placeholder.service.launch", "job.json"], RANK="0", **common
    )  # as accelerate launch does it
    second.start([sys.executable, "-c", JOINS], RANK="1", **common)
    while "joined" not in second.log:
        assert first.process.poll() is None and second.process.poll() is None, first.log + second.log
        time.sleep(0.05)
    second.process.kill()
    assert first.process.wait(60) == 1
    (said,) = [line for line in first.log.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: another process of this training has ended or is out of reach, see the log of its machine (")
    assert "Traceback" not in first.log
    assert first.files() - first.before == {"log"}


def test_a_process_ends_when_its_launcher_has_gone(monkeypatch):
    monkeypatch.setenv(LAUNCHER_VARIABLE, "none")
    alive, kept = os.pipe()  # at its end when nobody has `kept` any more
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            Ending()
        time.sleep(60)
        os._exit(0)
    os.close(kept)
    assert not select.select([alive], [], [], 1.5)[0], "it ends although its launcher is there"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([alive], [], [], 10)[0], "it goes on without its launcher"
    os.close(alive)


def test_accelerate_that_starts_one_process_instead_of_several_is_refused(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.setenv(name, "no")
    with pytest.raises(ValueError, match="was to start several processes and started this one alone: give it --multi_gpu"):
        Processes.from_environment()
    monkeypatch.delenv("MASTER_ADDR")
    assert Processes.from_environment() == Processes()
    PartialState._reset_state()


def test_only_what_a_lost_process_causes_is_called_that():
    with pytest.raises(RuntimeError, match="^shapes do not fit$") as raised, _together():
        raise RuntimeError("shapes do not fit")
    assert raised.type is RuntimeError
    with pytest.raises(torch.OutOfMemoryError), _together():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(LostProcessError, match=r"machine \(NCCL error: remote process exited\)$"), _together():
        raise torch.distributed.DistBackendError("NCCL error: remote process exited. Last error:\nsocket")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "job.json cannot be read"),
        ("[]", "job.json holds a list: give an object"),
        ('{"dataset": "d.zip", "output": "w.zip"}', "job.json lacks config"),
        ('{"dataset": "d.zip", "output": 1, "config": {}}', "job.json has output of the kind int: give str"),
        ('{"dataset": "d.zip", "output": "w.zip", "config": {}, "steps": 5}', "job.json has the unknown steps: known are"),
        ('{"dataset": "d.zip", "output": "w.zip", "config": {"stepz": 5}}', "job.json has the unknown stepz: known are"),
        ('{"dataset": "d.zip", "output": "w.zip", "config": {"steps": 0}}', "steps is 0: give a whole number from 1"),
        ('{"dataset": "d.zip", "output": "w.zip", "config": {}, "wandb": "p"}', "job.json has wandb of the kind str"),
        ('{"dataset": "d.zip", "output": "w.zip", "config": {}, "wandb": {"name": "p"}}', "job.json has the unknown name"),
    ],
)
def test_a_wrong_job_gets_its_sentence(content, sentence, tmp_path):
    file = tmp_path / "job.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        assert ProcessJob.read(file).train_config


def test_a_job_names_only_what_it_does_not_leave_as_it_is(tmp_path):
    file = tmp_path / "job.json"
    options = {"resolution": [64, 128], "placeholder_token": ["<a>", "<b>"], "learning_rate": 1e-3}
    file.write_text(json.dumps({"dataset": "d.zip", "output": "w.zip", "config": options, "wandb": {"project": "p"}}))
    job = ProcessJob.read(file)
    assert job.wandb == {"project": "p", "run": None, "entity": None}
    wanted = TrainConfig(
        resolution=(64, 128), placeholder_token=("<a>", "<b>"), learning_rate=1e-3, train_placeholder_token=True
    )
    assert job.train_config == wanted
    file.write_text(json.dumps(asdict(ProcessJob("d.zip", "w.zip", asdict(wanted)))))
    assert ProcessJob.read(file).train_config == wanted

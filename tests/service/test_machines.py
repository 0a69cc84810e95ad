"""Training on several machines: accelerate launch on each, in a folder of its own with files of its own."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.server import ROOT, free_port
from placeholder.config import TrainConfig, config_yaml
from placeholder.distributed import LostProcessError, _lost_process
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.model.base import MODEL_VARIABLE
from placeholder.weights.archive import read_weights
from tests.conftest import SHORT

CONFIG = TrainConfig(**SHORT | {"steps": 8}, train_placeholder_token=True, placeholder_token=("<zwx>",))
TRAIN = ["-m", "placeholder", "train", "dataset.zip", "-o", "weights.zip", "--config", "config.yaml"]


class Machine:
    """A folder with a data set, a base model and a configuration, in which one process of a training of two runs."""

    def __init__(self, folder: Path, dataset: Path, base):
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(parents=True)
        shutil.copy(dataset, folder / "dataset.zip")
        shutil.copytree(base.source, folder / "base")
        (folder / "config.yaml").write_text(config_yaml(CONFIG))
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
    """Two machines; none of their processes is left afterwards."""
    made = [Machine(tmp_path / name, dataset, base) for name in ("first", "second")]
    yield made
    for machine in made:
        if machine.process.poll() is None:
            machine.process.kill()
        machine.process.wait()
        machine.output.close()


def launched(machines: list[Machine]) -> list[int]:
    """The exit codes of accelerate launch on both machines."""
    port = free_port()
    for rank, machine in enumerate(machines):
        options = ["--num_machines=2", "--num_processes=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1"]
        options += [f"--main_process_port={port}", f"--log_dir={os.devnull}"]
        machine.start([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, *TRAIN])
    return [machine.process.wait(300) for machine in machines]


def test_two_machines_train_what_one_process_trains_with_the_batch_of_both(machines, base, dataset, tmp_path):
    first, second = machines
    (second.folder / "weights.zip").write_bytes(b"of another training")  # only the first machine writes
    second.before = second.files()
    assert launched(machines) == [0, 0], first.log + second.log
    assert first.files() - first.before == {"log", "weights.zip"}
    assert second.files() - second.before == {"log"}
    assert "Weights archive verified" in first.log and first.log.endswith(f"{first.folder / 'weights.zip'}\n")
    assert "Weights archive verified" not in second.log and "weights.zip" not in second.log
    weights = read_weights(first.folder / "weights.zip")
    assert weights.meta["processes"] == 2
    finetune(Job(dataset, replace(CONFIG, batch_size=2), tmp_path / "alone.zip"), base, lambda line: None)
    alone = read_weights(tmp_path / "alone.zip")
    assert alone.lora.keys() == weights.lora.keys()
    for name, value in alone.lora.items():
        torch.testing.assert_close(weights.lora[name], value, atol=1e-5, rtol=torch.finfo(value.dtype).eps)  # rounded to bf16
    torch.testing.assert_close(weights.embeddings["<zwx>"], alone.embeddings["<zwx>"], atol=1e-5, rtol=0)
    assert any(value.abs().max() > 1e-3 for name, value in weights.lora.items() if "lora_B" in name)  # which starts at zero


JOINS = """
import time
from placeholder.distributed import Processes
Processes.from_environment()
print("joined", flush=True)
time.sleep(300)
"""


def test_when_one_machine_has_gone_the_other_says_so_and_ends(machines):
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = machines
    first.start([sys.executable, *TRAIN], RANK="0", **common)  # as accelerate launch does it
    second.start([sys.executable, "-c", JOINS], RANK="1", **common)
    while "joined" not in second.log:
        assert first.process.poll() is None and second.process.poll() is None, first.log + second.log
        time.sleep(0.05)
    second.process.kill()
    assert first.process.wait(120) == 1
    (said,) = [line for line in first.log.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: another process of this training has ended or is out of reach, see the log of its machine (")
    assert "Traceback" not in first.log
    assert first.files() - first.before == {"log"}


def test_only_what_a_lost_process_causes_is_called_that():
    with pytest.raises(RuntimeError, match="^shapes do not fit$") as raised, _lost_process():
        raise RuntimeError("shapes do not fit")
    assert raised.type is RuntimeError
    with pytest.raises(torch.OutOfMemoryError), _lost_process():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(LostProcessError, match=r"machine \(NCCL error: remote process exited\)$"), _lost_process():
        raise torch.distributed.DistBackendError("NCCL error: remote process exited. Last error:\nsocket")

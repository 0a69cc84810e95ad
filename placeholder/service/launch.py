"""A training on all visible GPUs, in a process for each; where there is one GPU and no checkpoint is asked for, in this one.

`torchrun` or `accelerate launch` run the same on several machines: `accelerate launch --multi_gpu -m placeholder.service.launch job.json`,
where job.json holds the fields of ProcessJob (job.py).
"""

import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import torch

from placeholder.config import TrainConfig
from placeholder.errors import readable_errors
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job, WandbTarget
from placeholder.model.base import BaseModel
from placeholder.report.trackers import WandbTracker
from placeholder.service.job import ProcessJob, error_of
from placeholder.service.worker import GRACE_SECONDS, LESS_MEMORY, main
from placeholder.training.determinism import deterministic
from placeholder.training.setup import Log
from placeholder.transformer.compile import CACHE_VARIABLE, chosen_cache

PROCESSES_VARIABLE = "TRAINING_PROCESSES"
POLL_SECONDS = 0.2
ROOT = Path(__file__).parents[2]


def wanted_processes() -> int:
    """How many processes are to train: what TRAINING_PROCESSES says, otherwise one for each visible GPU.

    Raises ValueError unless that is a whole number from 1.
    """
    value = os.environ.get(PROCESSES_VARIABLE) or str(max(1, torch.cuda.device_count()))
    if not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise ValueError(f"{PROCESSES_VARIABLE} is {value!r}: give a whole number from 1, or leave it unset for one a GPU")
    return int(value)


def finetune_on_all_gpus(
    dataset: Path,
    config: TrainConfig,
    output: Path,
    log: Log = print,
    resume_from: Path | None = None,
    checkpoints: CheckpointFolder | None = None,
    target: WandbTarget | None = None,
) -> None:
    """Write the weights archive of a training to `output`; every process trains batches of `config.batch_size`.

    With checkpoints the training always has a process of its own, which outlives this one for the time of a last checkpoint.
    With a `target` one of the processes shows the training on Weights & Biases.
    Raises what `finetune` raises, in this process and in others.
    """
    count = wanted_processes()
    base = BaseModel.from_environment()
    if count == 1 and checkpoints is None:
        with readable_errors(LESS_MEMORY), deterministic(base.device), WandbTracker(target, log) as tracker:
            finetune(Job(dataset, config, output, resume_from), base, log, tracker=tracker)
        return
    job = ProcessJob(str(dataset), str(output), asdict(config), resume_from and str(resume_from), ends_with_stdin=True)
    if checkpoints is not None:
        job = replace(job, checkpoint_folder=str(checkpoints.path), checkpoint_every=checkpoints.every)
    if target is not None:
        job = replace(job, wandb=target.names())
    with tempfile.TemporaryDirectory(prefix="placeholder-job-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        code = _run(count, file, log, target.environment() if target else {})
        if error := error_of(file):
            raise error
        if code:
            raise RuntimeError(f"a training process ended with {code}: its own message is in the log above")


def _run(count: int, job: Path, log: Log, environment: dict[str, str]) -> int:
    """Train in `count` processes and hand their lines on; they end with this call, whatever ends it."""
    launcher = []
    if count > 1:  # without a folder for logs, of which it would leave an empty one behind
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", f"--log-dir={os.devnull}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    processes = subprocess.Popen(
        [sys.executable, *launcher, "-m", "placeholder.service.launch", str(job)],
        cwd=ROOT,
        env={
            "OMP_NUM_THREADS": threads,
            **os.environ,
            "TMPDIR": str(job.parent),  # what a process that is killed leaves goes with the folder
            CACHE_VARIABLE: chosen_cache() or str(job.parent / "compiled"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    # Not a SimpleQueue: under Cog's server a cancellation that arrives inside its C code ends the thread without unwinding it.
    lines: queue.Queue[str | None] = queue.Queue()
    output = processes.stdout

    def read() -> None:
        try:
            for line in output:
                lines.put(line.rstrip("\n"))
        finally:
            lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    served = "cog" in sys.modules and _knock() == 0
    try:
        while True:
            if served and _knock() == errno.ECONNREFUSED:
                processes.stdin.close()  # Cog's server has had SIGTERM: it hears no one any more, but waits for ten seconds
            try:
                line = lines.get(timeout=POLL_SECONDS)  # short, so that a cancellation is not held up
            except queue.Empty:
                continue
            if line is None:
                return processes.barrier()
            if not isinstance(error_of(job), ValueError):  # what follows that is the launcher's own account of it
                log(line)
    finally:
        _end(processes)
        reader.join(GRACE_SECONDS)  # the process that keeps a run on W&B ends after them, and holds their output until then


def _knock() -> int:
    """0 where a server listens on this machine's port for Cog, otherwise the number of the error."""
    port = os.environ.get("PORT", "5000")
    with socket.socket() as probe:
        probe.settimeout(POLL_SECONDS)
        return probe.connect_ex(("127.0.0.1", int(port))) if port.isdigit() else errno.EINVAL


def _end(processes: subprocess.Popen) -> None:
    """End the launcher and all that it has started; its processes end with their standard input."""
    processes.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(processes.pid, number)
        except ProcessLookupError:
            return
        try:
            processes.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the path of one job.json")
    main(Path(sys.argv[1]))

"""Starts a training in child processes, one a GPU, and follows them until they end.

Cog cancels by raising an exception at some bytecode of the thread that runs the training. Where that falls into a `__del__` or
a weakref callback, Python drops it and the cancel is lost. So the server imports no torch, and its thread only runs `_follow`.
"""

import ctypes
import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from placeholder.config import config_yaml
from placeholder.errors import Log
from placeholder.job import Job
from placeholder.service.worker import ERROR_VARIABLE, GRACE_SECONDS, LESS_MEMORY, train_here

PROCESSES_VARIABLE = "TRAINING_PROCESSES"
ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.1
KILL_SECONDS = 1.0  # from SIGTERM to SIGKILL, without a checkpoint to write or a run on W&B to finish
DIED = re.compile(rb"failed \(exitcode: (-\d+)\)")  # what torch's launcher logs of a process that a signal ended


def train(job: Job, log: Log) -> bool:
    """Train, and write the weights archive; True in the process that is to use the archive.

    In a process of torchrun or accelerate launch the training runs right here, otherwise in children of this process. Raises
    ValueError for what the user can correct, and RuntimeError.
    """
    if "RANK" in os.environ or ERROR_VARIABLE in os.environ:
        return train_here(job, log)
    count = process_count()
    with tempfile.TemporaryDirectory(prefix="placeholder-job-", ignore_cleanup_errors=True) as folder:
        config, error = Path(folder) / "config.yaml", Path(folder) / "error.json"
        config.write_text(config_yaml(job.config), encoding="utf-8")
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # as in the container
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",  # TMPDIR goes
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            ERROR_VARIABLE: str(error),
            "TMPDIR": folder,  # what a killed process leaves goes with it
            **(job.tracker.environment() if job.tracker else {}),
        }
        grace = GRACE_SECONDS if job.checkpoints or job.tracker else KILL_SECONDS
        run(command(job, config, count), environment, error, grace, log)
    return True


def process_count() -> int:
    """How many processes train: TRAINING_PROCESSES, otherwise one for each visible GPU, at least one.

    Raises ValueError unless that is a whole number from 1, and above the number of GPUs: NCCL takes one process for each.
    """
    gpus = visible_gpus()
    value = os.environ.get(PROCESSES_VARIABLE) or str(max(1, gpus))
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= (gpus or int(value))):
        most = f"a whole number from 1 to {gpus}, the number of GPUs" if gpus else "a whole number from 1"
        raise ValueError(f"{PROCESSES_VARIABLE} is {value!r}: give {most}, or leave it unset for one a GPU")
    return int(value)


def visible_gpus() -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves, as CUDA's driver counts them (CUDA Driver API, cuDeviceGetCount)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def command(job: Job, config: Path, count: int) -> list[str]:
    """The command line of a training in `count` processes; secrets travel in the environment."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", f"--log-dir={os.devnull}", "-m"]
    options = {"output": Path(job.output).absolute(), "config": config, "resume-from": job.resume_from}
    if job.checkpoints:
        options |= {"checkpoint-folder": job.checkpoints.path, "checkpoint-every": job.checkpoints.every}
    if job.tracker:
        options |= {f"wandb-{name}": value for name, value in job.tracker.names().items()}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    launched = [*(launcher if count > 1 else []), "placeholder"]
    return [sys.executable, "-m", *launched, "train", str(Path(job.dataset).absolute()), "--overwrite", *given]


def run(arguments: list[str], environment: dict[str, str], error: Path, grace: float, log: Log) -> None:
    """Run a training to its end, and hand its lines on.

    Raises what the file `error` tells, or RuntimeError where a process died without a word. All processes end with this call:
    with their standard input and by SIGTERM, or `grace` seconds later by SIGKILL.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
    gc.disable()  # a collection could run any __del__ in this thread
    try:
        child = subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)
        output = _Output(child.stdout, log)
        try:
            code = _follow(child, error, output)
        finally:
            child.stdin.close()  # first: should a second cancel interrupt this, the processes end all the same
            _end(child, grace)
            output.end()  # such as the line of a last checkpoint
    finally:
        gc.enable()
    if error.exists():
        told = json.loads(error.read_text(encoding="utf-8"))
        if told["traceback"]:
            log(told["traceback"])
        raise (ValueError if told["kind"] == "ValueError" else RuntimeError)(told["message"])
    if code := output.died or code:
        raise RuntimeError(_death(code))


def _end(child: subprocess.Popen, grace: float) -> None:
    """End the processes of a training; torchrun's workers and W&B's client have sessions of their own."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(child.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (child.poll() is None or any(map(_runs, family))) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in filter(_runs, family):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class _Output:
    """What a child prints, handed on line by line; `died` is the signal that ended a process of several, negative, or 0."""

    def __init__(self, stream: IO[bytes], log: Log):
        self.stream, self.log, self.rest, self.died = stream, log, b"", 0

    def forward(self, seconds: float) -> bool:
        """Wait up to `seconds` for output and hand its lines on; whether there was any."""
        readable, _, _ = select.select([self.stream], [], [], seconds)
        if not readable or not (chunk := os.read(self.stream.fileno(), 65536)):
            return False
        *lines, self.rest = (self.rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in filter(None, lines):
            self.log(line.decode("utf-8", "replace"))
            if found := DIED.search(line):
                self.died = int(found[1])
        return True

    def end(self) -> None:
        """Hand on what is left."""
        while self.forward(0):
            pass
        if self.rest:
            self.log(self.rest.decode("utf-8", "replace"))


def _follow(child: subprocess.Popen, error: Path, output: _Output) -> int:
    """Hand the child's output on until it ends, or until an error file says why it is going to."""
    while True:
        ended = child.poll() is not None  # before the last look at its output
        if not output.forward(0 if ended else POLL_SECONDS) and (ended or error.exists()):
            return child.returncode or 0


def _death(code: int) -> str:
    """What became of a process that could not say it itself."""
    if code == -signal.SIGKILL:
        return f"the training process was killed, most likely out of memory: {LESS_MEMORY}, or use a machine with more memory"
    if code < 0:
        name = signal.Signals(-code).name
        return f"the training process crashed in native code ({name}): see the log above, and train again"
    return f"the training process ended with exit code {code}: see the log above"

"""A training on all visible GPUs, in a process for each; where there is one GPU and no checkpoint is asked for, in this one.

`torchrun` or `accelerate launch` run the same on several machines: `accelerate launch -m placeholder.launch job.json`, where
job.json holds the fields of Job: the paths `dataset` and `output`, under `config` every option of TrainConfig, and optionally
`resume_from`, `checkpoint_folder`, `checkpoint_every` and `wandb` with `project`, `run` and `entity`, whose key WANDB_API_KEY holds.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from placeholder.checkpoint import CheckpointFolder
from placeholder.compiling import CACHE_VARIABLE, chosen_cache
from placeholder.config import TrainConfig
from placeholder.determinism import deterministic
from placeholder.failures import ShortageError, plain_failures
from placeholder.finetune import Stop, StoppedError, finetune
from placeholder.models import BaseModel
from placeholder.prepare import Log
from placeholder.processes import Processes
from placeholder.wandb_run import wandb_run
from placeholder.wandb_target import KEY_VARIABLE, WandbTarget

PROCESSES_VARIABLE = "TRAINING_PROCESSES"
ERROR_NAME = "error.json"
LESS_MEMORY = "give a smaller resolution or batch_size, or set quantize"
POLL_SECONDS, GRACE_SECONDS = 0.2, 8.0  # the server itself waits for ten
ROOT = Path(__file__).parents[1]


def wanted_processes() -> int:
    """How many processes are to train: what TRAINING_PROCESSES says, otherwise one for each visible GPU.

    Raises ValueError unless that is a whole number from 1.
    """
    value = os.environ.get(PROCESSES_VARIABLE) or str(max(1, torch.cuda.device_count()))
    if not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise ValueError(f"{PROCESSES_VARIABLE} is {value!r}: give a whole number from 1, or leave it unset for one a GPU")
    return int(value)


@dataclass(frozen=True)
class Job:
    """A training as a process of its own is told of it, by the path of a JSON file.

    `ends_with_stdin`: it ends when its standard input is closed, which happens when the process that started it has gone.
    """

    dataset: str
    output: str
    config: dict[str, Any]
    resume_from: str | None = None
    checkpoint_folder: str | None = None
    checkpoint_every: int | None = None
    wandb: dict[str, str | None] | None = None
    ends_with_stdin: bool = False

    @property
    def train_config(self) -> TrainConfig:
        """The configuration, whose tuples JSON has made lists."""
        return TrainConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in self.config.items()})


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
        with plain_failures(LESS_MEMORY), deterministic(base.device), wandb_run(target, log) as run:
            finetune(dataset, config, output, base, log, resume_from=resume_from, run=run)
        return
    job = Job(str(dataset), str(output), asdict(config), resume_from and str(resume_from), ends_with_stdin=True)
    if checkpoints is not None:
        job = replace(job, checkpoint_folder=str(checkpoints.path), checkpoint_every=checkpoints.every)
    if target is not None:
        job = replace(job, wandb=target.names())
    with tempfile.TemporaryDirectory(prefix="placeholder-job-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        code = _run(count, file, log, target.environment() if target else {})
        if error := _error_of(file):
            raise error
        if code:
            raise RuntimeError(f"a training process ended with {code}: its own message is in the log above")


def _run(count: int, job: Path, log: Log, environment: dict[str, str]) -> int:
    """Train in `count` processes and hand their lines on; they end with this call, whatever ends it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    threads = str(max(1, (os.cpu_count() or 1) // count))
    processes = subprocess.Popen(
        [sys.executable, *launcher, "-m", "placeholder.launch", str(job)],
        cwd=ROOT,
        env={
            "OMP_NUM_THREADS": threads,
            **os.environ,
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
                return processes.wait()
            if not isinstance(_error_of(job), ValueError):  # what follows that is the launcher's own account of it
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


def _error_of(job: Path) -> ValueError | RuntimeError | None:
    """The first error that a process has told of."""
    told = job.with_name(ERROR_NAME)
    if not told.exists():
        return None
    found = json.loads(told.read_text())
    return (ValueError if found["kind"] == "ValueError" else RuntimeError)(found["message"])


def _tell(job: Path, error: ValueError | RuntimeError, index: int) -> None:
    """Leave the error for the process that has started this one, unless another was first: what follows it is its echo."""
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    own = job.with_name(f"{index}-{ERROR_NAME}")
    own.write_text(json.dumps({"kind": kind, "message": str(error)}))
    with suppress(FileExistsError):
        os.link(own, job.with_name(ERROR_NAME))


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


class Ending:
    """How a training process is asked to end: by SIGTERM, or by its standard input, which closes when its starter has gone.

    It ends at once, unless the training heeds a stop by leaving a checkpoint; that is given GRACE_SECONDS.
    """

    def __init__(self, ends_with_stdin: bool):
        self.stop = Stop()
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        if ends_with_stdin:
            threading.Thread(target=self._watch_stdin, daemon=True).start()

    def end(self) -> None:
        """End now, or after the step that is being made."""
        if not self.stop.heeded:
            os._exit(1)
        self.stop.wanted = True
        timer = threading.Timer(GRACE_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()

    def _watch_stdin(self) -> None:
        os.read(0, 1)  # nothing is ever written; sys.stdin would hold a lock that the interpreter wants at its end
        self.end()


def main(file: Path) -> None:
    """One of the processes. Where it fails it ends at once, so that the launcher ends those that wait for it."""
    job = Job(**json.loads(file.read_text()))
    processes = Processes.from_environment()
    config = job.train_config
    checkpoints = CheckpointFolder.of(job.checkpoint_folder, job.checkpoint_every, config.steps)
    key = os.environ.pop(KEY_VARIABLE, None)
    ending = Ending(job.ends_with_stdin)

    def log(line: str) -> None:
        if processes.index == 0:
            with suppress(BrokenPipeError):  # the reader has gone; a last checkpoint is still to be written
                print(line, flush=True)

    try:
        target = WandbTarget.of(key, **job.wandb) if job.wandb and processes.index == 0 else None
        base = BaseModel.from_environment()
        with plain_failures(LESS_MEMORY), deterministic(base.device), wandb_run(target, log) as run:
            finetune(
                Path(job.dataset),
                config,
                Path(job.output),
                base,
                log,
                processes,
                Path(job.resume_from) if job.resume_from else None,
                checkpoints,
                ending.stop,
                run,
            )
    except (ValueError, RuntimeError) as error:
        if job.ends_with_stdin:  # somebody waits for what went wrong
            _tell(file, error, processes.index)
        if isinstance(error, ValueError | StoppedError | ShortageError):
            os._exit(1)  # the log is flushed line by line; taking the interpreter down would take its time
        raise
    PartialState().destroy_process_group()  # after a failure it would wait for processes that do not come


if __name__ == "__main__":
    main(Path(sys.argv[1]))

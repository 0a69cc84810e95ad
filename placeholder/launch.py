"""A training on all visible GPUs: here where there is one, in a process for each where there are more.

`torchrun` or `accelerate launch` run the same on several machines: `accelerate launch -m placeholder.launch job.json`, where
job.json holds the paths `dataset` and `output` and under `config` every option of TrainConfig.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState

from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.models import BaseModel
from placeholder.prepare import Log
from placeholder.processes import Processes

PROCESSES_VARIABLE = "TRAINING_PROCESSES"
ERROR_NAME = "error.json"
POLL_SECONDS, GRACE_SECONDS = 0.2, 5.0
ROOT = Path(__file__).parents[1]


def wanted_processes() -> int:
    """How many processes are to train: what TRAINING_PROCESSES says, otherwise one for each visible GPU.

    Raises ValueError unless that is a whole number from 1.
    """
    value = os.environ.get(PROCESSES_VARIABLE) or str(max(1, torch.cuda.device_count()))
    if not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise ValueError(f"{PROCESSES_VARIABLE} is {value!r}: give a whole number from 1, or leave it unset for one a GPU")
    return int(value)


def finetune_on_all_gpus(dataset: Path, config: TrainConfig, output: Path, log: Log = print) -> None:
    """Write the weights archive of a training to `output`; every process trains batches of `config.batch_size`.

    Raises what `finetune` raises, in this process and in others.
    """
    count = wanted_processes()
    base = BaseModel.from_environment()
    if count == 1:
        finetune(dataset, config, output, base, log)
        return
    with tempfile.TemporaryDirectory(prefix="placeholder-job-") as folder:
        job = Path(folder) / "job.json"
        options = {"dataset": str(dataset), "output": str(output), "config": asdict(config), "ends_with_stdin": True}
        job.write_text(json.dumps(options))
        code = _run(count, job, log)
        if error := _error_of(job):
            raise error
        if code:
            raise RuntimeError(f"a training process ended with {code}: its own message is in the log above")


def _run(count: int, job: Path, log: Log) -> int:
    """Train in `count` processes and hand their lines on; they end with this call, whatever ends it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    processes = subprocess.Popen(
        [*command, "-m", "placeholder.launch", str(job)],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": threads, **os.environ},
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

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
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


def _end_with_stdin() -> None:
    """End this process when the one that holds the other end of its standard input has gone, however it went."""
    os.read(0, 1)  # nothing is ever written; sys.stdin would hold a lock that the interpreter wants at its end
    os._exit(1)


def main(job: Path) -> None:
    """One of the processes. Where it fails it ends at once, so that the launcher ends those that wait for it."""
    options = json.loads(job.read_text())
    if options.get("ends_with_stdin"):
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = options["config"]
    tuples = {name: tuple(config[name]) for name in ("resolution", "placeholder_token")}
    processes = Processes.from_environment()

    def log(line: str) -> None:
        if processes.index == 0:
            print(line, flush=True)

    try:
        base = BaseModel.from_environment()
        finetune(Path(options["dataset"]), TrainConfig(**config | tuples), Path(options["output"]), base, log, processes)
    except (ValueError, RuntimeError) as error:
        _tell(job, error, processes.index)
        if isinstance(error, ValueError):
            sys.exit(1)
        raise
    PartialState().destroy_process_group()  # after a failure it would wait for processes that do not come


if __name__ == "__main__":
    main(Path(sys.argv[1]))

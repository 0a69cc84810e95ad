"""One process of a training: what it is asked to do, how it is asked to end, and what it says when it fails."""

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState

from placeholder.distributed import LostProcessError, Processes
from placeholder.errors import OutOfResourcesError, readable_errors
from placeholder.finetune import Stop, StoppedError, finetune
from placeholder.job import KEY_VARIABLE, CheckpointFolder, Job, WandbTarget
from placeholder.model.base import BaseModel
from placeholder.report.trackers import WandbTracker
from placeholder.service.job import ProcessJob, tell
from placeholder.training.determinism import deterministic

LESS_MEMORY = "give a smaller resolution or batch_size, or set quantize"
GRACE_SECONDS = 8.0  # the server itself waits for ten
PARENT_SECONDS = 1.0  # from one look for the launcher to the next
ECHO_SECONDS = 2.0  # within which the launcher ends the processes of a machine once one of them has ended
PLAIN = (
    ValueError,
    StoppedError,
    OutOfResourcesError,
    LostProcessError,
)  # say in a sentence what is wrong, and need no traceback
LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"  # set by torchrun and accelerate launch


class Ending:
    """How a training process is asked to end: by SIGTERM or SIGINT, or because its starter has gone.

    A launcher that has gone is known by another process being the parent, any other starter by the standard input, which closes.
    It ends at once, unless the training heeds a stop by leaving a checkpoint; that is given GRACE_SECONDS.
    """

    def __init__(self):
        self.stop = Stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.end())
        if LAUNCHER_VARIABLE in os.environ:
            threading.Thread(target=self._watch_parent, args=[os.getppid()], daemon=True).start()

    def end(self) -> None:
        """End now, or after the step that is being made."""
        if not self.stop.heeded:
            os._exit(1)
        self.stop.wanted = True
        timer = threading.Timer(GRACE_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()

    def watch_stdin(self) -> None:
        """End with the standard input."""
        threading.Thread(target=self._watch_stdin, daemon=True).start()

    def _watch_stdin(self) -> None:
        os.read(0, 1)  # nothing is ever written; sys.stdin would hold a lock that the interpreter wants at its end
        self.end()

    def _watch_parent(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        self.end()


def main(file: Path) -> None:
    """Train as the file of a job says. Where it fails it ends at once, so that the launcher ends those that wait for it."""
    ending = Ending()
    processes, job = Processes(), None
    try:
        processes = Processes.from_environment()  # first, so that the others do not wait for one that has no job
        job = ProcessJob.read(file)
        _train(job, processes, ending)
        processes.barrier()  # so that no machine ends well before the archive is there
    except (ValueError, RuntimeError) as error:
        ending.stop.heeded = False
        awaited = job is not None and job.ends_with_stdin  # somebody waits for what went wrong
        if awaited and not isinstance(error, LostProcessError):
            tell(file, error, processes.rank)
        elif isinstance(error, PLAIN):
            _say(error, processes)
        if not isinstance(error, PLAIN):
            traceback.print_exc()
        os._exit(1)  # the log is flushed line by line; taking the interpreter down would take its time
    PartialState().destroy_process_group()  # after a failure it would wait for processes that do not come


def _train(job: ProcessJob, processes: Processes, ending: Ending) -> None:
    if job.ends_with_stdin:
        ending.watch_stdin()
    config = job.train_config
    if processes.rank == 0 and not Path(job.output).absolute().parent.is_dir():
        raise ValueError(f"output {job.output}: its folder does not exist, make it first")
    checkpoints = CheckpointFolder.of(job.checkpoint_folder, job.checkpoint_every, config.steps)
    key = os.environ.pop(KEY_VARIABLE, None)

    def log(line: str) -> None:
        if processes.rank == 0:
            with suppress(BrokenPipeError):  # the reader has gone; a last checkpoint is still to be written
                print(line, flush=True)

    target = WandbTarget.of(key, **job.wandb) if job.wandb and processes.rank == 0 else None
    base = BaseModel.from_environment()
    with readable_errors(LESS_MEMORY), deterministic(base.device), WandbTracker(target, log) as tracker:
        training = Job(
            Path(job.dataset), config, Path(job.output), Path(job.resume_from) if job.resume_from else None, checkpoints
        )
        finetune(training, base, log, processes, ending.stop, tracker)


def _say(error: Exception, processes: Processes) -> None:
    """The error in one line on stderr, once on each machine.

    What another process of the machine has said before ends this one while it waits: the launcher sees to that.
    """
    time.sleep(ECHO_SECONDS * ((processes.local_rank > 0) + isinstance(error, LostProcessError)))
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

"""One process of a training: how it is asked to end, and how it says what went wrong.

The libraries that take seconds to import are imported once the process can be asked to end.
"""

import gc
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from placeholder.errors import Log, OutOfResourcesError, readable_errors
from placeholder.job import Job, Stop, StoppedError

if TYPE_CHECKING:
    from placeholder.distributed import Processes

ERROR_VARIABLE = "PLACEHOLDER_ERROR_FILE"  # set in the children of launch.py: where they tell what went wrong
LESS_MEMORY = "give a smaller resolution or batch_size, or set quantize"
GRACE_SECONDS = 8.0  # for a last checkpoint
PARENT_SECONDS = 1.0  # from one look at the parent to the next


def train_here(job: Job, log: Log) -> bool:
    """Train in this process, alone or in the group of its launcher; True in the first process of a group that a user started.

    A child of launch.py ends with the training, and a process that fails ends too: an interpreter takes seconds to shut down,
    and may wait for others of the group.
    """
    stop = Stop()
    end_when_asked(stop)
    try:
        first = _train(job, log, stop)
    except SystemExit:
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - whatever it is, launch.py raises it
        stop.heeded = False
        _fail(error)
    if ERROR_VARIABLE in os.environ:
        os._exit(0)
    return first


def _train(job: Job, log: Log, stop: Stop) -> bool:
    """Train in the group of this process; whether it is the first one."""
    gc.disable()  # it would look through what is imported over and over, for a fifth of the time, and in each later round again
    from accelerate import PartialState

    import placeholder.finetune  # noqa: F401 - imported here for its time
    from placeholder.distributed import Processes

    gc.freeze()
    gc.enable()
    processes = Processes.from_environment()
    _finetune(job, log, processes, stop)
    processes.all_gather([])  # no machine is done before the archive is there
    PartialState().destroy_process_group()
    return processes.rank == 0


def _finetune(job: Job, log: Log, processes: "Processes", stop: Stop) -> None:
    """`finetune` on the base model of the environment, with memory errors in one sentence.

    Only the first of several processes logs.
    """
    from placeholder.finetune import finetune
    from placeholder.model.base import BaseModel

    def own_log(line: str) -> None:
        if processes.rank == 0:
            with suppress(BrokenPipeError):  # the reader has gone; a last checkpoint is still to be written
                log(line)

    base = BaseModel.from_environment()
    with readable_errors(LESS_MEMORY):
        finetune(job, base, own_log, processes, stop)


def end_when_asked(stop: Stop) -> None:
    """End this process at SIGTERM or SIGINT, and when the process that started it has gone.

    SystemExit is raised, unless the training heeds `stop`: then it ends after its present step and a last checkpoint. A process
    whose starter has gone has GRACE_SECONDS for that.
    """

    def end(*_: object) -> None:
        _handle(signal.SIG_IGN)  # a second signal would interrupt what the first one began
        if not stop.heeded:
            raise SystemExit(1)
        stop.wanted = True

    def watch(parent: int) -> None:
        lifeline = [0] if ERROR_VARIABLE in os.environ else []  # standard input, to which nothing is ever written
        while os.getppid() == parent and not select.select(lifeline, [], [], PARENT_SECONDS)[0]:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    _handle(end)
    threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()


def _handle(handler: Callable | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _fail(error: Exception) -> NoReturn:
    """Write the error to the error file and wait for launch.py to end this process; without such a file say it on stderr."""
    from placeholder.distributed import LostProcessError

    lost = isinstance(error, LostProcessError)
    _handle(signal.SIG_DFL if lost else signal.SIG_IGN)  # torchrun reports the process that was lost once the others have ended
    plain = lost or isinstance(error, ValueError | StoppedError | OutOfResourcesError)
    trace = "" if plain else traceback.format_exc()
    message = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
    if file := os.environ.get(ERROR_VARIABLE):
        if not lost:  # what became of the other process is for launch.py to say
            kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
            own = Path(f"{file}.{os.getpid()}")
            own.write_text(json.dumps({"kind": kind, "message": message, "traceback": trace}), encoding="utf-8")
            own.replace(file)
        os.read(0, 1)
    else:
        print(f"{trace}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    os._exit(2 if isinstance(error, ValueError) else 1)

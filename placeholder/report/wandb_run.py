"""A run on Weights & Biases, as a training has it: the process that keeps the run, and what it is told.

That process alone holds wandb's client, so that neither the client, nor its server, nor a cancellation between its lines can
disturb a training. It ends when this process closes its standard input or is gone.
"""

import base64
import json
import os
import queue
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from placeholder.errors import label
from placeholder.job import FOLDER_VARIABLE, WandbTarget

Log = Callable[[str], None]
Pictures = Mapping[str, Sequence[tuple[str, bytes]]]
"""Captions and JPEG files by the name of the series."""

ROOT = Path(__file__).parents[2]
URL_VARIABLE, DEFAULT_URL = "WANDB_BASE_URL", "https://api.wandb.ai"
OWN_FOLDERS = ("TMPDIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
# To reach the server; to import the client and start its service; to upload the rest of a training that is done, or is not.
INIT_SECONDS, START_SECONDS, FINISH_SECONDS, GRACE_SECONDS = 30.0, 30.0, 60.0, 4.0
POLL_SECONDS = 0.2


def wandb_run(target: WandbTarget | None, log: Log) -> "AbstractContextManager[WandbRun | None]":
    """A run that is ended with the context, as failed where an exception ends it; None without a target."""
    return WandbRun(target, log) if target else nullcontext()


class WandbRun:
    """One run, once it is started; what goes wrong after that is a warning in the log.

    Nothing here waits for the network but `start` and the end.
    """

    def __init__(self, target: WandbTarget, log: Log):
        self.target, self.log = target, log
        # Known before it exists, so that an interruption cannot fall between the two.
        self.folder = Path(tempfile.gettempdir()) / f"placeholder-wandb-{secrets.token_hex(8)}"
        self.process: subprocess.Popen | None = None
        self.alive = self.started = False
        # Not SimpleQueues: under Cog's server a cancellation that arrives inside their C code ends the thread without unwinding it.
        self.outgoing: queue.Queue[bytes | None] = queue.Queue()
        self.incoming: queue.Queue[bytes | None] = queue.Queue()

    def __enter__(self) -> "WandbRun":
        return self

    def start(self, config: dict[str, Any]) -> None:
        """Begin the run with the configuration. Raises ValueError where W&B does not take it, or cannot be reached."""
        kept = self.target.offline or self.folder
        try:
            for folder in (self.folder, kept):
                folder.mkdir(mode=0o700 if folder == self.folder else 0o777, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{FOLDER_VARIABLE} {label(str(kept))} cannot be written ({error.strerror}): name another"
            ) from error
        env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") or name == URL_VARIABLE}
        env |= dict.fromkeys(OWN_FOLDERS, str(self.folder)) | {"WANDB_ERROR_REPORTING": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "placeholder.report.wandb_process"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # it tidies up by itself when the processes of the training are ended
        )
        self.alive = True
        for work in (self._write, self._read):
            threading.Thread(target=work, daemon=True).start()
        target = asdict(self.target) | {"offline": self.target.offline is not None, "folder": str(kept)}
        self._send(target | {"config": config, "init_seconds": INIT_SECONDS, "grace_seconds": GRACE_SECONDS})
        deadline, answer = time.monotonic() + START_SECONDS + INIT_SECONDS, None
        while self.alive and answer is None and time.monotonic() < deadline:
            answer = self._take(POLL_SECONDS, ending=True)
        if not answer or "ready" not in answer:
            url = re.sub("//[^/]*@", "//", os.environ.get(URL_VARIABLE) or DEFAULT_URL)
            reason = (answer or {}).get("error", "no answer")
            raise ValueError(
                f"the run cannot be started on W&B at {label(url)} ({reason}): check wandb_api_key, wandb_entity, wandb_project and the connection"
            )
        self.started = True
        self.log(f"W&B: {answer['ready']}")

    def step(self, number: int, values: Mapping[str, float], pictures: Pictures | None = None) -> None:
        """Show the values and pictures of a step; no step comes before an earlier one."""
        encoded = {
            name: [[caption, base64.b64encode(content).decode()] for caption, content in series]
            for name, series in (pictures or {}).items()
        }
        self._send({"step": number, "values": values, "pictures": encoded})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show what the whole training came to."""
        self._send({"summary": values})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            seconds = GRACE_SECONDS if kind else FINISH_SECONDS
            self._send({"end": 1 if kind else 0, "seconds": seconds})
            self.outgoing.put(None)
            deadline = time.monotonic() + seconds + GRACE_SECONDS
            while self.started and self.alive and time.monotonic() < deadline:
                self._take(POLL_SECONDS, ending=True)
        finally:
            self._end()

    def _send(self, message: dict[str, Any]) -> None:
        while self.alive and not self.incoming.empty():
            self._take(0)
        if self.alive:
            self.outgoing.put(json.dumps(message).encode() + b"\n")

    def _take(self, seconds: float, ending: bool = False) -> dict[str, Any] | None:
        """Wait so long for a line of the process; log what it says, return what it answers."""
        try:
            line = self.incoming.get(timeout=seconds) if seconds else self.incoming.get_nowait()
        except queue.Empty:
            return None
        if line is None:
            self.alive = False
            if not ending:
                self.log("Warning: W&B has ended early: the training goes on without it")
            return None
        message = json.loads(line)
        if "say" not in message:
            return message
        self.log(message["say"])
        return None

    def _write(self) -> None:
        stdin = self.process.stdin
        with suppress(OSError):  # it has ended, which its output tells
            while (line := self.outgoing.get()) is not None:
                stdin.write(line)
                stdin.flush()
        with suppress(OSError):
            stdin.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.incoming.put(line)
        self.incoming.put(None)

    def _end(self) -> None:
        """End the process and wandb's own below it where they have not ended by themselves; remove their files."""
        self.outgoing.put(None)  # again, for the thread that writes, where an interruption came before the first
        if self.process is not None:
            children = []
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, GRACE_SECONDS)
            self.process.wait()
        deadline = time.monotonic() + GRACE_SECONDS
        while self.folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self.folder, ignore_errors=True)  # wandb's own may outlive a client that was killed, for a moment

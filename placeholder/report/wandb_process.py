"""The process in which wandb's client runs: JSON lines in, JSON lines out, see wandb_run.py.

Nothing is collected that the training did not send: no code, git state, host name, machine, console or packages.
"""

import base64
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb

Say = Callable[..., None]
SETTINGS: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "symlink": False,
    "host": "",
    "program": "train.py",
    "label_disable": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_disable_viewer": True,
    "x_save_requirements": False,
}


def main() -> None:
    """Keep one run until the standard input ends; whatever happens, wandb's service and the temporary folder go with this process."""
    say = _answers()
    try:
        if first := sys.stdin.buffer.readline():
            _keep(json.loads(first), say)
    finally:
        _tidy()


def _answers() -> Say:
    """What writes an answer; all else that is printed here goes nowhere.

    The standard error stays open under another number, so that who waits for its end waits for this process too.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)

    def say(**answer: Any) -> None:
        with suppress(OSError):  # the training has gone
            print(json.dumps(answer), file=answers, flush=True)

    return say


def _keep(request: dict[str, Any], say: Say) -> None:
    mode, key = ("offline", None) if request["offline"] else ("online", request["key"])
    limits = {"init_timeout": request["init_seconds"], "login_timeout": request["init_seconds"]}
    try:
        run = wandb.init(
            project=request["project"],
            entity=request["entity"],
            name=request["run"],
            config=request["config"],
            dir=request["folder"],
            settings=wandb.Settings(mode=mode, api_key=key, **limits, **SETTINGS),
        )
    except (wandb.Error, ValueError, RuntimeError, OSError) as error:
        say(error=_reason(error, key))
        return
    say(ready=f"offline run in {Path(run.dir).parent}, which wandb sync uploads" if request["offline"] else run.url)
    ending = {"end": 1, "seconds": request["grace_seconds"]}  # of a training that is gone without a word
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "end" in message:
            ending = message
            break
        if "summary" in message:
            run.summary.update(message["summary"])
        else:
            run.log(message["values"] | _pictures(message), step=message["step"])
    timer = threading.Timer(ending["seconds"], _give_up, [ending["seconds"], say])
    timer.daemon = True
    timer.start()
    run.finish(exit_code=ending["end"])
    wandb.teardown()


def _pictures(message: dict[str, Any]) -> dict[str, list[wandb.Image]]:
    """The pictures of a step by the name of their series."""
    found: dict[str, list[wandb.Image]] = {}
    for name, series in message["pictures"].items():
        for number, (caption, content) in enumerate(series):
            path = Path(os.environ["TMPDIR"]) / f"{message['step']}-{name}-{number}.jpg"
            path.write_bytes(base64.b64decode(content))
            found.setdefault(name, []).append(wandb.Image(str(path), caption=caption))
    return found


def _reason(error: Exception, key: str | None) -> str:
    """The first line of what went wrong, without the key."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if text in ("", "<no message>"):
        text = "it gave no reason"
    return (text.replace(key, "...") if key else text)[:400]


def _give_up(seconds: float, say: Say) -> None:
    say(say=f"Warning: W&B had not taken everything after {seconds:g} seconds: the run there may be incomplete")
    _tidy()
    os._exit(1)


def _tidy() -> None:
    """End wandb's service, which would notice by itself that this process is gone, and remove what both wrote."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, 2)
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


if __name__ == "__main__":
    main()

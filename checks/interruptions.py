"""Trainings with checkpoints that are killed, cancelled and stopped: is anything lost, is anything left behind?

`make interruptions` kills twenty trainings on the smallest base model with SIGKILL at random moments and resumes each; cancels
a training through the server; stops a server that is training with SIGTERM. Writes checks/interruptions.json and fails where
a promise does not hold. `make cancels` cancels trainings without checkpoints.
"""

import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

from demo.server import ROOT, CogServer, data_url
from placeholder.config import TrainConfig
from placeholder.job import CheckpointFolder, Job
from placeholder.model.base import MODEL_VARIABLE
from placeholder.training.checkpoint import stored_checkpoints
from standin.small_base import build_tiny_base
from tests.support.samples import read_zip, write_dataset
from tests.support.trainings import child_training

KILLS, SEED = 20, 0
STEPS, EVERY = 400, 25
READY_SECONDS = 8.0  # after a cancel
END_SECONDS = 20.0  # a server waits ten for a training, and that has eight for its last checkpoint
CONFIG = TrainConfig(
    steps=STEPS,
    rank=4,
    resolution=(64,),
    learning_rate=1e-3,
    train_placeholder_token=True,
    placeholder_token=("<zwx>",),
    seed=1,
    report=False,
)
INPUTS = {"report": False, "rank": 4, "resolution": "64", "learning_rate": 1e-3, "placeholder_token": "<zwx>", "seed": 1}


class Bench:
    """A data set, the smallest base model, and folders for what trainings leave."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = str(build_tiny_base(ROOT / ".cache" / "tiny-base"))
        self.dataset = write_dataset(folder / "dataset.zip", ["a photo of <zwx>", "<zwx> in a garden", None])
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.env = {MODEL_VARIABLE: self.base, "TMPDIR": str(self.temporary)}

    def start(self, name: str, resume: bool = False) -> tuple[subprocess.Popen, Path]:
        """A training in a process of its own that leaves checkpoints in the folder `name`, and its archive."""
        checkpoints, output = self.folder / name, self.folder / f"{name}.zip"
        job = Job(self.dataset, CONFIG, output, checkpoints if resume else None, CheckpointFolder(checkpoints, EVERY))
        settings = {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return child_training(job, self.base, self.folder / f"{name}-job", **settings), output

    def server(self) -> CogServer:
        """A training server."""
        return CogServer("train", self.env, self.folder / "server.log")


def step_of(line: str) -> int | None:
    """The step of a progress line."""
    before, found, _ = line.partition(f"/{STEPS} [")
    return int(before.rsplit(" ", 1)[-1].rsplit("|", 1)[-1]) if found else None


def finished(process: subprocess.Popen, output: Path) -> dict[str, bytes]:
    """The archive of a training that is left alone, but for meta.json, which tells the time."""
    told = process.stdout.read()
    if process.wait():
        raise RuntimeError(f"a training ended with {process.returncode}:\n{told}")
    return {name: content for name, content in read_zip(output).items() if name != "meta.json"}


def killed(bench: Bench, name: str, moments: random.Random) -> dict[str, int]:
    """Kill a training at a random step and moment within it; the step that was told of last and the one it went on from."""
    moment, last = moments.randrange(1, STEPS), 0
    process, _ = bench.start(name)
    for line in process.stdout:
        last = step_of(line) or last
        if last >= moment:
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            break
    process.communicate()
    stored = stored_checkpoints(bench.folder / name)
    return {"killed_after_step": last, "checkpoint": int(stored[-1].stem[-6:]) if stored else 0}


def kills(bench: Bench) -> list[dict]:
    """Twenty trainings killed and resumed, against one that was left alone."""
    moments = random.Random(SEED)
    whole = finished(*bench.start("whole"))
    found = []
    for number in range(KILLS):
        name = f"killed-{number}"
        kill = killed(bench, name, moments)
        kill["equal"] = finished(*bench.start(name, resume=kill["checkpoint"] > 0)) == whole
        left = {path.name for path in (bench.folder / name).iterdir()}
        kill["left"] = sorted(left - {path.name for path in stored_checkpoints(bench.folder / name)})
        print(kill, flush=True)
        found.append(kill)
    return found


def ended(bench: Bench, name: str, end: Callable[[CogServer], None]) -> dict:
    """A server's training with checkpoints that is ended after its 200th step; how long that took, and what is left."""
    folder = bench.folder / name
    inputs = {"dataset": data_url(bench.dataset), **INPUTS, "steps": 20000, "checkpoint_folder": str(folder)}
    with bench.server() as server:
        told = server.log.stat().st_size
        server.start("long", inputs | {"checkpoint_every": 20000})
        while b" 200/20000 [" not in server.log.read_bytes()[told:]:
            time.sleep(0.05)
        started = psutil.Process(server.process.pid).children(recursive=True)
        trainings = [process for process in started if "--overwrite" in process.cmdline()]
        start = time.monotonic()
        end(server)
        seconds = time.monotonic() - start
        _, alive = psutil.wait_procs(trainings, timeout=30)
    return {
        "server_seconds": round(seconds, 2),
        "training_seconds": round(time.monotonic() - start, 2),
        "alive": len(alive),
        "checkpoints": [path.name for path in stored_checkpoints(folder)] if folder.is_dir() else [],
    }


def cancel(server: CogServer) -> None:
    """Cancel the training, and wait until the server is READY."""
    server.cancel("long")
    server.wait_until_ready()


def stop(server: CogServer) -> None:
    """Stop the server, as a container's runtime does."""
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=30)


def main() -> None:
    """Measure, write, and fail where a promise is broken."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.processor() or platform.machine()}
        found |= {"steps": STEPS, "checkpoint_every": EVERY, "killed": kills(bench)}
        found |= {"cancelled": ended(bench, "cancelled", cancel), "stopped": ended(bench, "stopped", stop)}
    (ROOT / "checks" / "interruptions.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: found[name] for name in ("cancelled", "stopped")}))
    # The line of a step may be read a little before or after its checkpoint is on the disk.
    kept = all(
        kill["equal"] and not kill["left"] and kill["checkpoint"] >= kill["killed_after_step"] - 2 * EVERY
        for kill in found["killed"]
    )
    ends = [found["cancelled"], found["stopped"]]
    left = all(end["training_seconds"] < END_SECONDS and not end["alive"] and len(end["checkpoints"]) == 1 for end in ends)
    ready = found["cancelled"]["server_seconds"] < READY_SECONDS
    if not (kept and left and ready):
        sys.exit(f"killed: {kept}, cancelled and stopped: {left}, ready: {ready}")


if __name__ == "__main__":
    main()

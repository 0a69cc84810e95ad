"""Trainings that are killed, cancelled and stopped at random moments: is anything lost, is anything left behind?

`make interruptions` kills twenty trainings on the smallest base model with SIGKILL and resumes each; cancels ten trainings
through the server; stops a server with SIGTERM that is training with checkpoints. Writes benchmarks/interruptions.json and
fails where a promise does not hold.
"""

import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil
from placeholder.service.job import ProcessJob

from demo.server import ROOT, CogServer, data_url, from_data_url
from placeholder.config import TrainConfig
from placeholder.model.base import MODEL_VARIABLE
from placeholder.training.checkpoint import stored_checkpoints
from standin.small_base import build_tiny_base
from tests.support.samples import read_zip, write_dataset

KILLS, CANCELS, SEED = 20, 10, 0
STEPS, EVERY = 400, 25
READY_SECONDS, STOP_SECONDS = 2.0, 10.0
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
        source = str(checkpoints) if resume else None
        job = ProcessJob(str(self.dataset), str(output), asdict(CONFIG), source, str(checkpoints), EVERY)
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "placeholder.service.launch", str(file)]
        env = self.env | {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), output

    def server(self) -> CogServer:
        """A training server."""
        return CogServer("train", self.env, self.folder / "server.log")


def step_of(line: str) -> int | None:
    """The step of a progress line."""
    before, found, _ = line.partition(f"/{STEPS} [")
    return int(before.rsplit(" ", 1)[-1].rsplit("|", 1)[-1]) if found else None


def finished(process: subprocess.Popen, output: Path) -> dict[str, bytes]:
    """The archive of a training that is left alone, but for meta.json, which tells the time."""
    told = process.communicate()[0]
    if process.returncode:
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


def processes_below(server: CogServer) -> int:
    """How many processes the server has started, its worker among them."""
    return len(psutil.Process(server.process.pid).children(recursive=True))


def cancels(bench: Bench) -> list[dict]:
    """Ten trainings cancelled through the server: how long until it is READY, what is left, and the next result."""
    moments = random.Random(SEED)
    short = {"dataset": data_url(bench.dataset), **INPUTS, "steps": 3}
    found = []

    def result(server: CogServer) -> dict[str, bytes]:
        archive = bench.folder / "cancelled.zip"
        archive.write_bytes(from_data_url(server.ask(short)["output"]["weights"]))
        return {name: content for name, content in read_zip(archive).items() if name != "meta.json"}

    with bench.server() as server:
        undisturbed, below = result(server), processes_below(server)
        for number in range(CANCELS):
            checkpointed = {"checkpoint_folder": str(bench.folder / f"cancelled-{number}")} if number % 5 == 4 else {}
            told = server.log.stat().st_size
            server.start(f"training-{number}", short | {"steps": 20000} | checkpointed)
            while checkpointed and b"/20000 [" not in server.log.read_bytes()[told:]:
                time.sleep(0.05)  # it takes a process of its own some seconds to begin
            seconds = moments.uniform(0.0, 4.0)
            time.sleep(seconds)
            start = time.monotonic()
            server.cancel(f"training-{number}")
            server.wait_until_ready()
            ready = time.monotonic() - start
            cancel = {"after_seconds": round(seconds, 2), "checkpoints": bool(checkpointed), "ready_seconds": round(ready, 2)}
            cancel["processes_left"] = processes_below(server) - below
            cancel["files_left"] = [path.name for path in bench.temporary.glob("placeholder-*")]
            cancel["equal"] = result(server) == undisturbed
            print(cancel, flush=True)
            found.append(cancel)
    return found


def stopped(bench: Bench) -> dict:
    """A server that is stopped with SIGTERM in the middle of a training with checkpoints."""
    folder = bench.folder / "stopped"
    inputs = {"dataset": data_url(bench.dataset), **INPUTS, "steps": 20000, "checkpoint_folder": str(folder)}
    with bench.server() as server:
        server.start("long", inputs | {"checkpoint_every": 20000})
        while " 200/20000 [" not in server.log.read_text():
            time.sleep(0.05)
        trainings = psutil.Process(server.process.pid).children(recursive=True)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=30)
        ended = time.monotonic() - start
        _, alive = psutil.wait_procs(trainings, timeout=30)
        seconds = time.monotonic() - start
    return {
        "server_seconds": round(ended, 2),
        "all_processes_seconds": round(seconds, 2),
        "alive": len(alive),
        "checkpoints": [path.name for path in stored_checkpoints(folder)] if folder.is_dir() else [],
    }


def main() -> None:
    """Measure, write, and fail where a promise is broken."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.processor() or platform.machine()}
        found |= {"steps": STEPS, "checkpoint_every": EVERY}
        found |= {"killed": kills(bench), "cancelled": cancels(bench), "stopped": stopped(bench)}
    (ROOT / "benchmarks" / "interruptions.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["stopped"]))
    # The line of a step may be read a little before or after its checkpoint is on the disk.
    kept = all(
        kill["equal"] and not kill["left"] and kill["checkpoint"] >= kill["killed_after_step"] - 2 * EVERY
        for kill in found["killed"]
    )
    ready = all(
        cancel["equal"]
        and cancel["ready_seconds"] < READY_SECONDS
        and not cancel["processes_left"]
        and not cancel["files_left"]
        for cancel in found["cancelled"]
    )
    end = found["stopped"]
    ended = end["all_processes_seconds"] < STOP_SECONDS and not end["alive"] and len(end["checkpoints"]) == 1
    if not (kept and ready and ended):
        sys.exit(f"killed: {kept}, cancelled: {ready}, stopped: {ended}")


if __name__ == "__main__":
    main()

"""Trainings cancelled at random moments through the real Cog server: is a cancel lost, is the server READY in time?

`make cancels` cancels two hundred trainings of the smallest base model between their first line and their last, writes
checks/cancels.json, and fails where a cancel is lost, READY takes longer than two seconds, or something is left behind.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import requests

from demo.server import ROOT, CogServer, data_url
from placeholder.model.base import MODEL_VARIABLE
from standin.small_base import build_tiny_base
from tests.support.samples import write_dataset

COUNT, SEED = 200, 0
READY_SECONDS, LOST_SECONDS = 2.0, 30.0
RACE_SECONDS = 0.5  # a cancel may come while the last line of a training is on its way
STEPS = 60  # about a second of them
INPUTS = {"report": False, "rank": 4, "resolution": "64", "placeholder_token": "<zwx>", "seed": 1, "steps": STEPS}


@dataclass
class Cancels:
    """What became of the cancels: seconds until READY, how many were lost, how many came when the training was over."""

    seconds: list[float]
    lost: int = 0
    finished: int = 0

    def facts(self) -> dict[str, Any]:
        """Counts and times for a JSON file."""
        return {
            "cancelled": len(self.seconds),
            "lost": self.lost,
            "finished_before": self.finished,
            "ready_seconds_median": round(statistics.median(self.seconds), 2),
            "ready_seconds_worst": round(max(self.seconds), 2),
        }


def cancel_at(moments: Sequence[float], server: CogServer, inputs: dict[str, Any]) -> Cancels:
    """Start a training for each moment and cancel it so many seconds later; stops where the server does not get READY.

    A cancel is lost where the server does not get READY, or only once the training has written its archive.
    """
    found = Cancels([])
    for number, moment in enumerate(moments):
        server.start(f"cancel-{number}", inputs)
        time.sleep(moment)
        before, start = archives(server), time.monotonic()
        try:
            server.cancel(f"cancel-{number}")
        except requests.HTTPError as error:
            if error.response.status_code != 404:
                raise
            found.finished += 1
            server.wait_until_ready()
            continue
        while not (ready := server.is_ready()) and time.monotonic() - start < LOST_SECONDS:
            time.sleep(0.02)
        seconds = time.monotonic() - start
        found.seconds.append(seconds)
        found.lost += not ready or (seconds > RACE_SECONDS and archives(server) > before)
        if not ready:
            break
    return found


def archives(server: CogServer) -> int:
    """How many archives the server's trainings have written so far."""
    return server.log.read_text().count("Weights archive verified")


def main(count: int = COUNT) -> None:
    """Measure, write, and fail where a promise is broken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        dataset = write_dataset(folder / "dataset.zip", ["a photo of <zwx>", "<zwx> in a garden", None])
        env = {MODEL_VARIABLE: str(build_tiny_base(ROOT / ".cache" / "tiny-base")), "TMPDIR": str(folder / "tmp")}
        inputs = INPUTS | {"dataset": data_url(dataset)}
        with CogServer("train", env, folder / "server.log") as server:
            start = time.monotonic()
            answer = server.ask(inputs)
            whole = time.monotonic() - start
            before = len(psutil.Process(server.process.pid).children(recursive=True))
            moments = random.Random(SEED)
            found = cancel_at([moments.uniform(0, whole) for _ in range(count)], server, inputs)
            time.sleep(1)
            processes = len(psutil.Process(server.process.pid).children(recursive=True)) - before
            again = server.ask(inputs)
        left = sorted(path.name for path in (folder / "tmp").glob("placeholder-*"))
    facts = {"date": datetime.now(UTC).date().isoformat(), "training_seconds": round(whole, 1), **found.facts()}
    facts |= {"processes_left": processes, "files_left": left, "next_training": again["status"]}
    print(json.dumps(facts))
    (ROOT / "checks" / "cancels.json").write_text(json.dumps(facts, indent=2) + "\n")
    late = facts["lost"] or facts["ready_seconds_worst"] > READY_SECONDS
    if late or processes or left or {answer["status"], again["status"]} != {"succeeded"}:
        sys.exit("a promise is broken, see checks/cancels.json")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

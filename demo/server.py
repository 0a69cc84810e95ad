"""The real Cog server as a child process: started, waited for, asked, and stopped."""

import base64
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[1]
START_SECONDS = 120


class CogServer:
    """`python -m cog.server.http` in `train` or `predict` mode, on a free port, with `env` added to the environment."""

    def __init__(self, mode: str, env: dict[str, str], log: Path):
        self.mode = mode
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = log
        stub = {
            "train": ("COG_TRAIN_TYPE_STUB", "train.py:train"),
            "predict": ("COG_PREDICT_TYPE_STUB", "predict.py:Predictor"),
        }
        variable, target = stub[mode]
        self.env = os.environ | env | {variable: target, "PORT": self.url.rsplit(":", 1)[1]}
        # The worker is started as `python` from PATH, which has to be this interpreter's.
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"

    def __enter__(self) -> "CogServer":
        arguments = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--x-mode", self.mode]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(arguments, cwd=ROOT, env=self.env, stdout=output, stderr=subprocess.STDOUT)
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self) -> None:
        """Wait for READY; raises RuntimeError when setup fails or takes longer than START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.is_ready():
                return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not become ready; see {self.log}")

    def is_ready(self) -> bool:
        """Whether the server can take a request now; raises RuntimeError when its setup failed."""
        try:
            health = requests.get(f"{self.url}/health-check", timeout=5).json()
        except requests.ConnectionError:
            return False
        if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
            raise RuntimeError(f"the server's setup failed: {health}")
        return health["status"] == "READY"

    def ask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One training or prediction; the server's answer as it is, whether it succeeded or failed."""
        route = "trainings" if self.mode == "train" else "predictions"
        answer = self._unless_busy(lambda: requests.post(f"{self.url}/{route}", json={"input": inputs}, timeout=1800))
        return answer.json()

    def start(self, name: str, inputs: dict[str, Any]) -> None:
        """Begin a training or prediction called `name` and do not wait for it."""
        route = "trainings" if self.mode == "train" else "predictions"
        headers = {"Prefer": "respond-async"}
        self._unless_busy(
            lambda: requests.put(f"{self.url}/{route}/{name}", json={"input": inputs}, headers=headers, timeout=30)
        )

    @staticmethod
    def _unless_busy(send: Callable[[], requests.Response]) -> requests.Response:
        """The answer, after five seconds at most; the server is busy (409) for about 100 ms after a result too."""
        for _ in range(50):
            response = send()
            if response.status_code != 409:
                response.raise_for_status()
                return response
            time.sleep(0.1)
        raise RuntimeError("the server stayed busy")

    def cancel(self, name: str) -> None:
        """Cancel what `start` began."""
        route = "trainings" if self.mode == "train" else "predictions"
        requests.post(f"{self.url}/{route}/{name}/cancel", timeout=30).raise_for_status()


def data_url(path: Path) -> str:
    """A file as a data URL, the way small files travel in a request."""
    return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode()


def from_data_url(url: str) -> bytes:
    """The content of a data URL, the way results come back without an upload URL."""
    return base64.b64decode(url.split(",", 1)[1])


def free_port() -> int:
    """A port that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""A training on Weights & Biases: its options, scalars and sampled images.

The photographs of the data set and the report's page, which holds them, are never sent.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from PIL.Image import Image

from placeholder.config import TrainConfig
from placeholder.errors import Log, label
from placeholder.job import FOLDER_VARIABLE, WandbTarget
from placeholder.report.report import Report
from placeholder.training.context import Training, schedule
from placeholder.training.loop import Step
from placeholder.training.progress import Point, Progress
from placeholder.weights.archive import embedding_name

# Nothing is collected that the training does not send: no code, git state, host name, machine, console output or packages.
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
    "finish_timeout_raises": True,
}
URL_VARIABLE, MAX_REASON = "WANDB_BASE_URL", 400
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # to reach the server; to upload what is left at the end


class WandbTracker:
    """A run on Weights & Biases, and a context manager that finishes it: as failed where an exception ends the context.

    Without a target every method does nothing. Once the run has started, a failure of W&B is one warning in the log.
    """

    def __init__(
        self, target: WandbTarget | None, log: Log, init_seconds: float = INIT_SECONDS, finish_seconds: float = FINISH_SECONDS
    ):
        self.target, self.log, self.init_seconds, self.finish_seconds = target, log, init_seconds, finish_seconds
        self.run: Any = None  # a wandb.Run
        self._closing = ExitStack()

    def __enter__(self) -> "WandbTracker":
        return self

    def start(self, config: TrainConfig, facts: Mapping[str, Any]) -> None:
        """Start the run with the options and `facts`; of a base model in a folder only the folder's name is sent.

        Raises ValueError where W&B refuses the key, cannot be reached, or the folder of an offline run cannot be written.
        """
        if self.target is None:
            return
        target, url = self.target, re.sub("//[^/]*@", "//", os.environ.get(URL_VARIABLE) or "https://api.wandb.ai")
        temporary = self._closing.enter_context(
            tempfile.TemporaryDirectory(prefix="placeholder-wandb-", ignore_cleanup_errors=True)
        )
        self._closing.enter_context(_own_environment(temporary))
        folder = target.offline or Path(temporary)
        import wandb  # here, because it takes a second and most trainings have no run

        settings = wandb.Settings(
            mode="offline" if target.offline else "online",
            api_key=target.key,
            init_timeout=self.init_seconds,
            finish_timeout=self.finish_seconds,
            stop_fn=lambda: self.log("Warning: a run stopped on W&B does not stop the training"),  # instead of SIGINT
        )
        options = asdict(config) | dict(facts) | {"base_model": PurePath(facts["base_model"]).name}
        names = {"project": target.project, "entity": target.entity, "name": target.run}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._closing.callback(wandb.teardown)  # before the temporary folder is removed
            wandb.setup(wandb.Settings(**SETTINGS))
            self.run = wandb.init(config=options, dir=folder, settings=settings, **names)
        except (wandb.Error, ValueError, RuntimeError, OSError) as error:
            check = FOLDER_VARIABLE if target.offline else "wandb_api_key, wandb_entity, wandb_project and the connection"
            raise ValueError(
                f"the run cannot be started on W&B at {label(url)} ({self._reason(error)}): check {check}"
            ) from None
        offline = f"offline run in {Path(self.run.dir).parent}, which wandb sync uploads"
        self.log(f"W&B: {offline if target.offline else self.run.url}")

    def step(self, step: int, scalars: Mapping[str, float], samples: Sequence[tuple[str, Image]] = ()) -> None:
        """Show the scalars of a step and its sampled images with their prompts; steps only increase."""
        self._show(step, scalars, "samples", samples)

    def end(self, step: int, meta: Mapping[str, Any], before_and_after: tuple[str, Image] | None = None) -> None:
        """Show the grid with its prompts, and as a summary what meta.json adds to the options; `step` is the last one."""
        self._show(step, {}, "before_and_after", [before_and_after] if before_and_after else [])
        with self._warn_on_error():
            if self.run is not None:
                summary = {name: value for name, value in meta.items() if name not in self.run.config and value is not None}
                self.run.summary.update(summary)

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._warn_on_error():
            if self.run is not None:
                self.run.finish(exit_code=1 if kind else 0)
        with suppress(OSError, SystemExit):  # of a client process that has died, which the log already says
            self._closing.close()

    def _show(self, step: int, scalars: Mapping[str, float], name: str, images: Sequence[tuple[str, Image]]) -> None:
        with self._warn_on_error():
            if self.run is not None and (scalars or images):
                from wandb import Image as WandbImage

                shown = {name: [WandbImage(image, caption=prompt) for prompt, image in images]} if images else {}
                self.run.log({**scalars, **shown}, step=step)

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        """Turn whatever the client raises into a warning, and go on without a run."""
        try:
            yield
        except TimeoutError:
            self.run = None
            self.log(
                f"Warning: W&B did not take everything within {self.finish_seconds:g} seconds: the run there is incomplete"
            )
        except Exception as error:  # noqa: BLE001 - of many kinds, and none of them is worth a training
            self.run = None
            self.log(f"Warning: W&B has failed ({self._reason(error)}): the training goes on without it")

    def _reason(self, error: Exception) -> str:
        """The first line of an error, without the API key; what follows is advice on wandb's own settings."""
        first = str(error).strip().partition("\n")[0][:MAX_REASON] or type(error).__name__
        return first.replace(self.target.key, "...") if self.target.key else first


@contextmanager
def _own_environment(folder: str) -> Iterator[None]:
    """Of the variables for W&B, which may be those of other work, the server's address alone; its folders are `folder`."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    own = {f"WANDB_{kind}_DIR": folder for kind in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
    for name in before.keys() - {URL_VARIABLE}:
        del os.environ[name]
    # The client's own reports of its errors, with tracebacks, are off.
    os.environ.update(own, WANDB_ERROR_REPORTING="false")
    try:
        yield
    finally:
        for name in (*own, "WANDB_ERROR_REPORTING"):
            os.environ.pop(name, None)
        os.environ.update(before)


def show_step(
    tracker: WandbTracker, training: Training, config: TrainConfig, progress: Progress, report: Report | None, step: Step
) -> None:
    """Show a step that has a progress line or samples; progress and report have taken it in before."""
    point, samples = progress.curve[-1], report.samples.get(step.number, []) if report else []
    scalars = step_scalars(step.number, config, training, point) if point.step == step.number else {}
    tracker.step(step.number, scalars, samples)


def step_scalars(step: int, config: TrainConfig, training: Training, point: Point) -> dict[str, float]:
    """Losses, learning rates and the norm of each token embedding at `point`, the progress line of the step just made."""
    state = training.state
    lora = state.lora_optimizer.param_groups[0]
    scalars = {"loss": point.loss} | ({} if point.preservation is None else {"preservation": point.preservation})
    # Prodigy's rate is its own estimate `d`; while the token embeddings learn alone the LoRA's is 0.
    scalars["learning_rate/lora"] = float(lora["lr"] * lora.get("d", 1.0)) if step > schedule(config).token_only_steps else 0.0
    if state.token_optimizer is not None:
        scalars["learning_rate/token"] = state.token_optimizer.adamw.param_groups[0]["lr"]
    for token, rows in training.tokens.embeddings().items():  # (R, D)
        name, norms = f"row_norm/{PurePath(embedding_name(token)).stem}", rows.norm(dim=1).tolist()
        scalars |= {name: norms[0]} if len(norms) == 1 else {f"{name}/{number}": norm for number, norm in enumerate(norms, 1)}
    return scalars

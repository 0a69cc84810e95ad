"""What a training shows of itself on Weights & Biases: its configuration, the figures of its log, pictures that it has drawn.

The photographs of the data set and the report's page, which holds them, stay with the user.
"""

from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from placeholder.config import TrainConfig
from placeholder.report.charts import draw_grid
from placeholder.report.report import Report, jpeg
from placeholder.report.wandb_run import WandbRun
from placeholder.training.progress import Record
from placeholder.training.training import Training
from placeholder.weights.archive import embedding_name

# What meta.json and the run's summary both say.
SUMMARY = (
    "training_mode",
    "seed",
    "loss",
    "training_seconds",
    "expected_peak_gb",
    "peak_gb",
    "transformer_storage",
    "images",
    "captions_found",
    "buckets",
    "placeholder_token_ids",
    "placeholder_row_norms",
    "diagnostics",
)


def start(run: WandbRun, config: TrainConfig, shared: dict[str, Any]) -> None:
    """Begin the run with the resolved options; of a base model that is a folder only the name is told."""
    run.start(asdict(config) | shared | {"base_model": PurePath(shared["base_model"]).name})


def show_step(
    run: WandbRun, number: int, config: TrainConfig, record: Record, training: Training, report: Report | None
) -> None:
    """Show what step `number` came to, where it has a progress line or samples."""
    point = record.curve[-1]
    values = {} if point.step != number else {"loss": point.loss, **_rates(number, config, training), **_row_norms(training)}
    if values and point.preservation is not None:
        values["preservation"] = point.preservation
    samples = report.samples.get(number, []) if report else []
    pictures = list(zip(report.sample_prompts, map(jpeg, samples), strict=True)) if samples else []
    if values or pictures:
        run.step(number, values, {"samples": pictures} if pictures else {})


def show_end(run: WandbRun, config: TrainConfig, training: Training, report: Report | None, meta: dict[str, Any]) -> None:
    """Show the pictures before and after, and what the training came to as a whole."""
    if report and report.grid:
        prompts = list(training.prompts)
        run.step(config.steps, {}, {"before_and_after": [("\n".join(prompts), jpeg(draw_grid(report.grid, prompts)))]})
    run.summary({name: meta[name] for name in SUMMARY if meta.get(name) is not None})


def _rates(number: int, config: TrainConfig, training: Training) -> dict[str, float]:
    """The learning rates of step `number`, which was the last; prodigy's is its own estimate `d` of the step size."""
    train_state = training.train_state
    lora = train_state.lora_optimizer.param_groups[0]
    learns = number > train_state.rows_alone(config)
    rates = {"learning_rate/lora": float(lora["lr"] * lora.get("d", 1.0)) if learns else 0.0}
    if train_state.row_optimizer is not None:
        rates["learning_rate/token"] = train_state.row_optimizer.adamw.param_groups[0]["lr"]
    return rates


def _row_norms(training: Training) -> dict[str, float]:
    """The norm of each row by its token, as it stands in the archive, and its number where a token has several."""
    norms = {}
    for token, rows in training.tokens.embeddings().items():
        name = f"row_norm/{PurePath(embedding_name(token)).stem}"
        found = rows.norm(dim=1).tolist()
        norms |= {name: found[0]} if len(found) == 1 else {f"{name}/{number}": norm for number, norm in enumerate(found, 1)}
    return norms

"""What a training is given and what it consists of."""

import secrets
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.captions import Caption
from placeholder.data.dataset import DatasetReport
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.errors import Log
from placeholder.model.base import BaseModel
from placeholder.options import MAX_SEED
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEncoder
from placeholder.training.loop import Schedule, TrainState
from placeholder.training.memory_plan import Plan
from placeholder.training.progress import Progress, Timing
from placeholder.training.resume import Start

COMPILED_FROM = 2000  # steps of a training on a GPU; docs/hardware.md has the times


@dataclass(frozen=True)
class Context:
    """What every stage of a training needs. `config.seed` is not None; `start` is what the training is resumed from."""

    config: TrainConfig
    base: BaseModel
    log: Log
    processes: Processes = SINGLE_PROCESS
    start: Start = None
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class TrainingData:
    """What is known of the data: the report on it, the captions as trained, the digest that tells it again.

    `descriptions` are what autocaption wrote; `thumbnails` those of the first images, for the report.
    """

    report: DatasetReport
    captions: list[Caption]
    descriptions: list[str]
    digest: str
    thumbnails: list[Image.Image]


@dataclass(frozen=True)
class Training:
    """A training that is ready to start. `initial_rows` is a copy of the token embeddings (R, D) before the first step.

    `shown_prompts`: the ids of the prompts that images are generated of for the report.
    """

    data: TrainingData
    plan: Plan
    state: TrainState
    tokenizer: PreTrainedTokenizerBase
    tokens: PlaceholderTokens
    initial_rows: Tensor
    prompt_embeds: PromptEncoder
    shown_prompts: dict[str, tuple[int, ...]]


def with_seed(config: TrainConfig, log: Log) -> TrainConfig:
    """The configuration with the seed that the training really uses."""
    drawn = config.seed is None
    config = replace(config, seed=secrets.randbelow(MAX_SEED + 1)) if drawn else config
    log(f"Seed: {config.seed}{' (drawn)' if drawn else ''}")
    return config


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the blocks are compiled. Blank: on a GPU, in a training long enough to gain more than compiling takes."""
    if config.torch_compile is None:
        return device.type == "cuda" and config.steps >= COMPILED_FROM
    return config.torch_compile


def schedule(config: TrainConfig) -> Schedule:
    """How long a training takes, and when preservation acts."""
    token_only = round(config.steps * config.placeholder_warmup_fraction) if config.tokens else 0
    weight = config.prior_preservation if config.preserves else 0.0
    return Schedule(config.steps, token_only, weight, config.prior_preservation_interval)


def checkpoint_facts(training: Training, config: TrainConfig, progress: Progress, shared: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside the training's state, as JSON; `shared` is what a resumed training has to share."""
    return {
        "config": asdict(config),
        "progress": progress.state_dict(),
        "dataset_digest": training.data.digest,
        "transformer_storage": training.plan.chosen.quantization,
        "modulations_tabled": training.plan.chosen.tabled,
        "descriptions": training.data.descriptions,
        **shared,
    }

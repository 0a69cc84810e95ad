"""The arms of the study: ways to teach a subject, and the training of each."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.flops import flop_counter
from placeholder.config import TrainConfig
from placeholder.data.captions import without_token
from placeholder.distributed import SINGLE_PROCESS
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training.context import Context, Training, schedule
from placeholder.training.flow import TIMESTEPS
from placeholder.training.loop import Step, train_steps
from placeholder.training.setup import prepare
from standin.sampler import Sampler
from standin.world import RARE_WORD, SIDE, TRIGGER
from study.subjects import Subject

TOKEN = "<zwx>"
UNSEEN_STRING = "zwx"  # letters that no caption of the world has
STEPS = 300
SAMPLING_STEPS = 14  # on the earlier model eight lost nothing that shows (docs/predict.md, go_fast)
BUDGET = {"steps": STEPS, "rank": 8, "learning_rate": 1e-3, "batch_size": 4, "resolution": (SIDE,), "report": False}
PRESERVED = {"prior_preservation": 4.0, "prior_preservation_interval": 4}
VOCABULARY_RMS = 0.02  # standard deviation of the small base's own embedding rows at their start
COUNTED = 4  # steps of which the FLOPs are counted: a whole interval of preservation


@dataclass(frozen=True)
class Arm:
    """One way to teach a subject: the word it is called by, options that differ from the budget, changes that no option has.

    `fixed_norm`: the token's embedding keeps its norm and learns a direction. `uniform`: sigmas are drawn uniformly.
    """

    trigger: str
    options: dict = field(default_factory=dict)
    fixed_norm: bool = False
    uniform: bool = False

    @property
    def preserved(self) -> bool:
        """Whether preservation is on; trigger words have it too, which train() does not offer."""
        return bool(self.options.get("prior_preservation"))

    def config(self, seed: int, budget: dict[str, Any] = BUDGET) -> TrainConfig:
        """The options of its training."""
        token = (TOKEN,) if self.trigger == TOKEN else ()
        return TrainConfig(**budget | self.options, seed=seed, train_placeholder_token=bool(token), placeholder_token=token)


ARMS: dict[str, Arm] = {
    "TOK": Arm(TRIGGER),
    "TOK, preservation": Arm(TRIGGER, PRESERVED),
    "sks": Arm(RARE_WORD),
    "unseen string zwx": Arm(UNSEEN_STRING),
    "class word alone": Arm(""),
    "token": Arm(TOKEN),
    "token, preservation": Arm(TOKEN, PRESERVED),
    "token, embedding frozen": Arm(TOKEN, {"placeholder_learning_rate": 0.0}),
    "token, embedding of fixed norm": Arm(TOKEN, {"placeholder_init_std": VOCABULARY_RMS}, fixed_norm=True),
    "token, uniform sigmas": Arm(TOKEN, uniform=True),
}
REFERENCE, OURS = "TOK", "token"
VARIANTS = tuple(name for name in ARMS if name.startswith("token, embedding") or ARMS[name].uniform)  # for one subject alone


def prepared(arm: Arm, dataset: Path, config: TrainConfig, base: BaseModel) -> tuple[Training, nn.Module]:
    """The training before its first step, and its text encoder; `config` is one of the arm's."""
    training = prepare(dataset, Context(config, base, log=lambda line: None))
    encoder = training.prompt_embeds.text_encoder or load_text_encoder(base)
    if arm.preserved and arm.trigger != TOKEN:
        preserve_without_token(training, arm.trigger, encoder)
    if arm.uniform:
        draw_uniformly(training, config.seed)
    return training, encoder


def on_the_small_base(arm: Arm, subject: Subject, seed: int, base: BaseModel) -> tuple[Training, Sampler]:
    """The training of a subject on the small base model, and a sampler of its transformer."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = subject.write_dataset(Path(folder) / "data.zip", arm.trigger)
        training, encoder = prepared(arm, dataset, arm.config(seed), base)
    parts = base, training.state.transformer, encoder, training.tokenizer, training.tokens
    return training, Sampler(*parts, steps=SAMPLING_STEPS)


def steps_of(arm: Arm, training: Training, config: TrainConfig) -> Iterator[Step]:
    """The steps of an arm's training."""
    plan = replace(schedule(config), prior_preservation=config.prior_preservation or 0.0)
    rows = training.tokens.rows
    norms = training.initial_rows.norm(dim=1, keepdim=True)
    for step in train_steps(training.state, plan, SINGLE_PROCESS):
        if arm.fixed_norm:
            with torch.no_grad():
                rows.mul_(norms / rows.norm(dim=1, keepdim=True))
        yield step


def preserve_without_token(training: Training, trigger: str, encoder: nn.Module) -> None:
    """Preservation for a trigger word: as for a token, the captions without it and the empty prompt are kept."""
    batches, tokenizer = training.state.sampler, training.tokenizer
    captions = [without_token(caption.text, (trigger,), "") for caption in training.data.captions]
    ids = [prompt_ids(tokenizer, training.tokens, caption) for caption in captions]
    training.prompt_embeds.text_encoder = encoder
    training.prompt_embeds.cache([*ids, batches.empty_ids])
    crops = len(batches.examples) // len(ids)
    batches.examples = [
        replace(example, preserved=(ids[number // crops], batches.empty_ids)) for number, example in enumerate(batches.examples)
    ]


def draw_uniformly(training: Training, seed: int | None) -> None:
    """Noise levels drawn from 1/1000 to 1, each as often: what diffusers' training scripts do by default."""
    sampler, generator = training.state.sampler, torch.Generator().manual_seed(seed or 0)
    next_batch = sampler.next_batch

    def uniform() -> list:
        sigmas = torch.randint(1, TIMESTEPS + 1, (sampler.batch_size,), generator=generator) / TIMESTEPS
        return [replace(sample, sigma=sigma) for sample, sigma in zip(next_batch(), sigmas, strict=True)]

    sampler.next_batch = uniform


def step_flops(arm: Arm, subject: Subject, base: BaseModel) -> float:
    """FLOPs of a step of the training, a mean over an interval of preservation."""
    training, _ = on_the_small_base(arm, subject, 0, base)
    with flop_counter() as counter:
        for _ in steps_of(arm, training, replace(arm.config(seed=0), steps=COUNTED)):
            pass
    return counter.get_total_flops() / COUNTED

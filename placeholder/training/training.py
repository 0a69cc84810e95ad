"""A training that is ready to start, and all that is known of it then."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.captions import Caption
from placeholder.data.dataset import DatasetReport
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEncoder
from placeholder.training.examples import Example, Position
from placeholder.training.loop import Step, TrainState, training_steps
from placeholder.training.memory_plan import Plan
from placeholder.transformer.payback import Payback


@dataclass(frozen=True)
class Training:
    """What `prepare` makes. `initial_rows` is a copy of the token rows (R, D) before the first step.

    For the report: the `captions` as trained, `thumbnails` of the first pictures, and the ids of the `prompts` that it shows
    pictures of. `descriptions` are what autocaption found to say, for checkpoints.
    """

    train_state: TrainState
    examples: list[Example]
    empty_ids: tuple[int, ...]
    position: Position
    tokenizer: PreTrainedTokenizerBase
    tokens: PlaceholderTokens
    initial_rows: Tensor
    prompt_embeds: PromptEncoder
    report: DatasetReport
    dataset_digest: str
    plan: Plan
    payback: Payback
    captions: list[Caption]
    descriptions: list[str]
    thumbnails: list[Image.Image]
    prompts: dict[str, tuple[int, ...]]

    def steps(self, config: TrainConfig, processes: Processes = SINGLE_PROCESS) -> Iterator[Step]:
        """The training's steps; `config` is what it was prepared with."""
        return training_steps(self.train_state, self.examples, self.empty_ids, config, self.position, processes)

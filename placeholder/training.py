"""A training that is ready to start, and all that is known of it then."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.batches import Example, Position
from placeholder.captions import Caption
from placeholder.config import TrainConfig
from placeholder.dataset import DatasetReport
from placeholder.payback import Payback
from placeholder.placeholder_token import PlaceholderTokens
from placeholder.plan import Plan
from placeholder.processes import ALONE, Processes
from placeholder.prompts import PromptEmbeddings
from placeholder.trainer import Step, Trainee, training_steps


@dataclass(frozen=True)
class Training:
    """What `prepare` makes. `initial_rows` is a copy of the token rows (R, D) before the first step.

    For the report: the `captions` as trained, `thumbnails` of the first pictures, and the ids of the `prompts` that it shows
    pictures of. `descriptions` are what autocaption found to say, for checkpoints.
    """

    trainee: Trainee
    examples: list[Example]
    empty_ids: tuple[int, ...]
    position: Position
    tokenizer: PreTrainedTokenizerBase
    tokens: PlaceholderTokens
    initial_rows: Tensor
    prompt_embeds: PromptEmbeddings
    report: DatasetReport
    dataset_digest: str
    plan: Plan
    payback: Payback
    captions: list[Caption]
    descriptions: list[str]
    thumbnails: list[Image.Image]
    prompts: dict[str, tuple[int, ...]]

    def steps(self, config: TrainConfig, processes: Processes = ALONE) -> Iterator[Step]:
        """The training's steps; `config` is what it was prepared with."""
        return training_steps(self.trainee, self.examples, self.empty_ids, config, self.position, processes)

"""Training examples, and the batches that are sampled from them with their sigmas and noise."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.captions import Caption, preserved_prompts
from placeholder.errors import Log, listed
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import prompt_ids, tokenized
from placeholder.training.flow import sample_sigma

MAX_NOISE_SEED = 2**63 - 1


@dataclass(frozen=True)
class Example:
    """One crop of one image: packed latents fp32 (L, C), its height and width in tokens, its shift mu, its prompt's ids.

    `preserved`: prompts, as ids, for which the LoRA is to keep the base model's prediction at this image's noisy latents.
    `weights`: of the tokens in the loss, fp32 (L,), from the image's mask; None for all the same.
    """

    latents: Tensor
    grid: tuple[int, int]
    mu: float
    input_ids: tuple[int, ...]
    preserved: tuple[tuple[int, ...], ...] = ()
    weights: Tensor | None = None


@dataclass(frozen=True)
class Prompts:
    """The captions as ids inside the prompt template, and for each of them the ids of the prompts to preserve beside it."""

    ids: list[tuple[int, ...]]
    preserved: list[tuple[tuple[int, ...], ...]]

    @property
    def all(self) -> list[tuple[int, ...]]:
        """Every prompt that a step may encode."""
        return [*self.ids, *(ids for preserved in self.preserved for ids in preserved)]


def prompts_of(
    captions: list[Caption], config: TrainConfig, tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, log: Log
) -> Prompts:
    """The ids of the captions, and of what is to be preserved beside them; logs which captions are cut.

    Raises ValueError where a caption's token is left out, because nothing would be learned of it.
    """
    tokenized_captions = {caption: tokenized(tokenizer, tokens, caption.text) for caption in captions}
    cut = [f"{caption.name}: {words}" for caption, prompt in tokenized_captions.items() if (words := prompt.cut(tokens))]
    lost = [f"{caption.name}: {prompt.cut(tokens)}" for caption, prompt in tokenized_captions.items() if prompt.lost(tokens)]
    if lost:
        raise ValueError(f"the caption of {lost[0]}: shorten it, or name the token earlier")
    if cut:
        log(f"Warning: {len(cut)} of {len(captions)} captions are cut, {listed(cut)}")
    preserved = [
        tuple(prompt_ids(tokenizer, tokens, prompt) for prompt in prompts)
        for prompts in preserved_prompts([caption.text for caption in captions], config, log)
    ]
    if config.log_prompt_ids:
        for text, used in {caption.text: prompt.used for caption, prompt in tokenized_captions.items()}.items():
            log(f"Prompt '{text}' tokenized to: {list(used)}")
    return Prompts([tokenized_captions[caption].ids for caption in captions], preserved)


@dataclass(frozen=True)
class Sample:
    """One element of a batch: an example with the prompt, the sigma () and the seed of the noise sampled for it."""

    example: Example
    input_ids: tuple[int, ...]
    sigma: Tensor
    noise_seed: int

    @cached_property
    def noise(self) -> Tensor:
        """Standard normal noise, fp32 (L, C), made where it is used: each process makes that of its own samples alone."""
        return torch.randn(self.example.latents.shape, generator=torch.Generator().manual_seed(self.noise_seed))


def draw_sample(example: Example, empty_ids: tuple[int, ...], caption_dropout: float, generator: torch.Generator) -> Sample:
    """Draw the sigma, the noise's seed and, with probability `caption_dropout`, the empty prompt."""
    dropped = torch.rand((), generator=generator).item() < caption_dropout
    sigma = sample_sigma(example.mu, generator)
    noise_seed = int(torch.randint(MAX_NOISE_SEED, (), generator=generator))
    return Sample(example, empty_ids if dropped else example.input_ids, sigma, noise_seed)


class BatchSampler:
    """Samples batches without replacement: each example comes once an epoch, in a new order.

    Every random number of the steps comes from `generator`, on the CPU, so that all processes sample the same batches.
    """

    def __init__(
        self,
        examples: list[Example],
        empty_ids: tuple[int, ...],
        batch_size: int,
        caption_dropout: float,
        generator: torch.Generator,
    ):
        self.examples, self.empty_ids = examples, empty_ids
        self.batch_size, self.caption_dropout, self.generator = batch_size, caption_dropout, generator
        self.indices_left: list[int] = []

    def next_batch(self) -> list[Sample]:
        """The batch of the next step."""
        return [
            draw_sample(self.examples[self._next_index()], self.empty_ids, self.caption_dropout, self.generator)
            for _ in range(self.batch_size)
        ]

    def _next_index(self) -> int:
        if not self.indices_left:
            self.indices_left = torch.randperm(len(self.examples), generator=self.generator).tolist()
        return self.indices_left.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches still to come."""
        return {"indices_left": list(self.indices_left), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the sampler whose state this is."""
        self.generator.set_state(state["generator"])
        self.indices_left = list(state["indices_left"])


def grouped(batch: list[Sample]) -> list[list[Sample]]:
    """The batch in groups that can be stacked without padding: same image size and same length of each of their prompts."""
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in batch:
        lengths = (len(ids) for ids in (sample.input_ids, *sample.example.preserved))
        groups[(sample.example.grid, *lengths)].append(sample)
    return list(groups.values())

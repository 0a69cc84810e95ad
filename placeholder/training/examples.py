"""What a step is made on: pictures as examples, and the batches that are drawn of them with their noise."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.training.flow import sample_sigma

MAX_NOISE_SEED = 2**63 - 1


@dataclass(frozen=True)
class Example:
    """One crop of one picture: packed latents fp32 (L, C), its height and width in tokens, its shift, its prompt's ids.

    `preserved` are prompts, as ids, that are to keep what the base model predicts for them at this picture's noisy latents.
    `weights` are those of the tokens in the loss, fp32 (L,), None for all the same.
    """

    latents: Tensor
    grid: tuple[int, int]
    mu: float
    input_ids: tuple[int, ...]
    preserved: tuple[tuple[int, ...], ...] = ()
    weights: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """One element of a batch: an example with the prompt, the noise level () and the seed of the noise drawn for it.

    The noise itself is made where it is needed: not in the other processes, nor to look ahead.
    """

    example: Example
    input_ids: tuple[int, ...]
    sigma: Tensor
    noise_seed: int

    @cached_property
    def noise(self) -> Tensor:
        """Standard normal noise, fp32 (L, C)."""
        return torch.randn(self.example.latents.shape, generator=torch.Generator().manual_seed(self.noise_seed))


@dataclass
class Position:
    """Where a training stands: the steps made, the examples that this round still has to bring, the source of randomness.

    Every random number of the steps comes from `generator`, on the CPU, the same in every process.
    """

    generator: torch.Generator
    step: int = 0
    upcoming: list[int] = field(default_factory=list)

    def next_index(self, count: int) -> int:
        """An index below `count`; each comes once before any comes again."""
        if not self.upcoming:
            self.upcoming = torch.randperm(count, generator=self.generator).tolist()
        return self.upcoming.pop(0)

    def copy(self) -> "Position":
        """One that stands where this stands, and moves by itself."""
        generator = torch.Generator().set_state(self.generator.get_state())
        return Position(generator, self.step, list(self.upcoming))


def draw_batch(
    examples: list[Example],
    empty_ids: tuple[int, ...],
    config: TrainConfig,
    position: Position,
    processes: Processes,
) -> list[Sample]:
    """Draw the batch of all processes for one step; the position's randomness and examples move along."""
    return [
        draw_sample(examples[position.next_index(len(examples))], empty_ids, config.caption_dropout, position.generator)
        for _ in range(config.batch_size * processes.world_size)
    ]


def draw_sample(example: Example, empty_ids: tuple[int, ...], caption_dropout: float, generator: torch.Generator) -> Sample:
    """Draw the noise level, the noise's seed and, with probability `caption_dropout`, the empty prompt."""
    dropped = torch.rand((), generator=generator).item() < caption_dropout
    sigma = sample_sigma(example.mu, generator)
    noise_seed = int(torch.randint(MAX_NOISE_SEED, (), generator=generator))
    return Sample(example, empty_ids if dropped else example.input_ids, sigma, noise_seed)


def grouped(batch: list[Sample]) -> list[list[Sample]]:
    """The batch in groups that can be stacked without padding: of one picture shape and one length of each of their prompts."""
    groups: dict[tuple, list[Sample]] = {}
    for sample in batch:
        lengths = (len(ids) for ids in (sample.input_ids, *sample.example.preserved))
        groups.setdefault((sample.example.grid, *lengths), []).append(sample)
    return list(groups.values())

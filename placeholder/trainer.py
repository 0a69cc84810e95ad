"""The training loop: a generator that makes one step after another and yields what each came to."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from placeholder.batches import Example, Position, Sample, draw_batch, grouped
from placeholder.config import TrainConfig
from placeholder.determinism import StrictSteps
from placeholder.exchange import GradientExchange, computed_together
from placeholder.losses import PromptEmbeds, preservation_losses, sample_losses
from placeholder.memory import BlockCheckpointing
from placeholder.optimizers import RowOptimizer
from placeholder.processes import ALONE, Processes

LORA_MAX_GRAD_NORM = 1.0  # max_grad_norm of diffusers' DreamBooth LoRA scripts


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, its loss and its preservation loss, fp32 (), still on the device.

    `preservation` is None where nothing was preserved in this step; `recomputed` is the number of blocks whose activations were recomputed in its backward pass.
    """

    number: int
    loss: Tensor
    preservation: Tensor | None
    recomputed: int


@dataclass(frozen=True)
class Trainee:
    """What is trained and what it takes: the transformer with its LoRA, the prompts' embeddings, optimisers, checkpointing."""

    transformer: QwenImageTransformer2DModel
    prompt_embeds: PromptEmbeds
    lora: list[nn.Parameter]
    lora_optimizer: torch.optim.Optimizer
    checkpointing: BlockCheckpointing
    row_optimizer: RowOptimizer | None = None

    def rows_alone(self, config: TrainConfig) -> int:
        """In how many steps, at the start, the rows learn alone."""
        return round(config.steps * config.placeholder_warmup_fraction) if self.row_optimizer else 0


def training_steps(
    trainee: Trainee,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    config: TrainConfig,
    position: Position,
    processes: Processes = ALONE,
) -> Iterator[Step]:
    """Train from `position`, which moves along, to step `config.steps`.

    The gradient is that of the mean loss over a batch of `config.batch_size` for each process, plus `config.prior_preservation`
    times the mean preservation loss of each preserved prompt in every `config.prior_preservation_interval`-th step. In the first `config.placeholder_warmup_fraction` of
    the steps the rows learn alone. Their gradient and the LoRA's are handled apart: a shared clip would let the rows' first huge
    gradients silence the LoRA. A step that runs out of CUDA memory in any process is made again in all of them with more blocks
    recomputed; torch.OutOfMemoryError is raised in all of them once that process recomputes every block.
    """
    rows_alone = trainee.rows_alone(config)
    batch_size = config.batch_size * processes.count
    strict = StrictSteps()
    rows = trainee.row_optimizer and trainee.row_optimizer.rows
    exchange = GradientExchange(processes, trainee.lora, rows)
    for number in range(position.step + 1, config.steps + 1):
        lora_learns = number > rows_alone
        # The preserved prompts hold no token: while the rows learn alone there is nothing for them to do.
        preserves = lora_learns and number % config.prior_preservation_interval == 0
        batch = draw_batch(examples, empty_ids, config, position, processes)
        weight = config.prior_preservation * preserves
        compute = partial(gradients, trainee, processes.share(batch), batch_size, weight)
        loss, preservation = computed_together(compute, trainee.checkpointing, processes, strict)
        rows_learn = any(sample.input_ids != empty_ids for sample in batch)
        exchange.add_up([loss] if preservation is None else [loss, preservation], rows_learn)
        if lora_learns:
            torch.nn.utils.clip_grad_norm_(trainee.lora, LORA_MAX_GRAD_NORM)
            trainee.lora_optimizer.step()
        if trainee.row_optimizer is not None:
            trainee.row_optimizer.step()
        position.step = number
        yield Step(number, loss, preservation, trainee.checkpointing.recomputed)


def gradients(
    trainee: Trainee, batch: list[Sample], batch_size: int, prior_preservation: float
) -> tuple[Tensor, Tensor | None]:
    """Set the gradients of the LoRA and of the rows from `batch`, which is all or a part of `batch_size` samples.

    Returns its share in the mean loss and in the mean preservation loss, summed over the preserved prompts, fp32 ().
    """
    loss, preservation = torch.zeros((), device=trainee.transformer.device), None
    trainee.lora_optimizer.zero_grad(set_to_none=True)
    window = None
    if trainee.row_optimizer is not None:
        trainee.row_optimizer.rows.grad = None
        window = trainee.prompt_embeds.window([sample.input_ids for sample in batch])
    for group in grouped(batch):
        part = sample_losses(trainee.transformer, window or trainee.prompt_embeds, group).sum() / batch_size
        part.backward()
        loss += part.detach()
        if not prior_preservation:
            continue
        for prompts in zip(*(sample.example.preserved for sample in group), strict=True):
            part = preservation_losses(trainee.transformer, trainee.prompt_embeds, group, prompts).sum() / batch_size
            (prior_preservation * part).backward()
            preservation = part.detach() if preservation is None else preservation + part.detach()
    if window is not None:
        window.backward()
    return loss, preservation

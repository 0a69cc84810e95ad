"""The training loop: a generator that makes one step after another and yields what each came to."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.training.determinism import StrictSteps
from placeholder.training.examples import Example, Position, Sample, draw_batch, grouped
from placeholder.training.exchange import GradientExchange, computed_together
from placeholder.training.losses import PromptEmbeds, preservation_losses, sample_losses
from placeholder.training.optimizers import RowOptimizer
from placeholder.transformer.checkpointing import BlockCheckpointing

LORA_MAX_GRAD_NORM = 1.0  # max_grad_norm of diffusers' DreamBooth LoRA scripts


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, its loss and its preservation loss, fp32 (), still on the device.

    `preservation` is None where nothing was preserved in this step; `checkpointed` is the number of blocks whose activations were checkpointed in its backward pass.
    """

    number: int
    loss: Tensor
    preservation: Tensor | None
    checkpointed: int


@dataclass(frozen=True)
class TrainState:
    """What is trained and what it takes: the transformer with its LoRA, the prompts' embeddings, optimizers, checkpointing."""

    transformer: nn.Module
    prompt_embeds: PromptEmbeds
    lora: list[nn.Parameter]
    lora_optimizer: torch.optim.Optimizer
    checkpointing: BlockCheckpointing
    row_optimizer: RowOptimizer | None = None

    def rows_alone(self, config: TrainConfig) -> int:
        """In how many steps, at the start, the rows learn alone."""
        return round(config.steps * config.placeholder_warmup_fraction) if self.row_optimizer else 0


def training_steps(
    train_state: TrainState,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    config: TrainConfig,
    position: Position,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Step]:
    """Train from `position`, which moves along, to step `config.steps`.

    The gradient is that of the mean loss over a batch of `config.batch_size` for each process, plus `config.prior_preservation`
    times the mean preservation loss of each preserved prompt in every `config.prior_preservation_interval`-th step. In the first `config.placeholder_warmup_fraction` of
    the steps the rows learn alone. Their gradient and the LoRA's are handled apart: a shared clip would let the rows' first huge
    gradients silence the LoRA. A step that runs out of CUDA memory in any process is made again in all of them with more blocks
    checkpointed; torch.OutOfMemoryError is raised in all of them once that process recomputes every block.
    """
    rows_alone = train_state.rows_alone(config)
    batch_size = config.batch_size * processes.world_size
    strict = StrictSteps()
    rows = train_state.row_optimizer and train_state.row_optimizer.rows
    exchange = GradientExchange(processes, train_state.lora, rows)
    for number in range(position.step + 1, config.steps + 1):
        lora_learns = number > rows_alone
        # The preserved prompts hold no token: while the rows learn alone there is nothing for them to do.
        preserves = lora_learns and number % config.prior_preservation_interval == 0
        batch = draw_batch(examples, empty_ids, config, position, processes)
        weight = config.prior_preservation * preserves
        compute = partial(gradients, train_state, processes.shard(batch), batch_size, weight)
        loss, preservation = computed_together(compute, train_state.checkpointing, processes, strict)
        rows_learn = any(sample.input_ids != empty_ids for sample in batch)
        exchange.add_up([loss] if preservation is None else [loss, preservation], rows_learn)
        if lora_learns:
            torch.nn.utils.clip_grad_norm_(train_state.lora, LORA_MAX_GRAD_NORM)
            train_state.lora_optimizer.step()
        if train_state.row_optimizer is not None:
            train_state.row_optimizer.step()
        position.step = number
        yield Step(number, loss, preservation, train_state.checkpointing.checkpointed)


def gradients(
    train_state: TrainState, batch: list[Sample], batch_size: int, prior_preservation: float
) -> tuple[Tensor, Tensor | None]:
    """Set the gradients of the LoRA and of the rows from `batch`, which is all or a part of `batch_size` samples.

    Returns its share in the mean loss and in the mean preservation loss, summed over the preserved prompts, fp32 ().
    """
    loss, preservation = torch.zeros((), device=train_state.transformer.device), None
    train_state.lora_optimizer.zero_grad(set_to_none=True)
    window = None
    if train_state.row_optimizer is not None:
        train_state.row_optimizer.rows.grad = None
        window = train_state.prompt_embeds.window([sample.input_ids for sample in batch])
    for group in grouped(batch):
        part = sample_losses(train_state.transformer, window or train_state.prompt_embeds, group).sum() / batch_size
        part.backward()
        loss += part.detach()
        if not prior_preservation:
            continue
        for prompts in zip(*(sample.example.preserved for sample in group), strict=True):
            part = preservation_losses(train_state.transformer, train_state.prompt_embeds, group, prompts).sum() / batch_size
            (prior_preservation * part).backward()
            preservation = part.detach() if preservation is None else preservation + part.detach()
    if window is not None:
        window.backward()
    return loss, preservation

"""The training loop: a generator that makes one step after another and yields the losses of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.devices import free_memory
from placeholder.distributed import Processes
from placeholder.errors import out_of_memory
from placeholder.training.examples import BatchSampler, Sample, grouped
from placeholder.training.losses import Denoiser, PromptEmbeds, flow_matching_losses, inputs_of, preservation_losses
from placeholder.training.optimizers import FlatOptimizer, TokenOptimizer
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.compile import CompiledBlocks
from placeholder.transformer.graphs import Losses, Passes

LORA_MAX_GRAD_NORM = 1.0  # max_grad_norm of diffusers' DreamBooth LoRA scripts
# How computing the gradients went in one process: well, or out of memory, with what can still be done about that.
DONE, WITHOUT_GRAPHS, MORE_CHECKPOINTS, UNCAPTURED, HOPELESS = range(5)


@dataclass(frozen=True)
class Step:
    """One step: its number from 1, its loss and its preservation loss, fp32 (), still on the device.

    `preservation` is None where nothing was preserved; `checkpointed` is the number of checkpointed blocks.
    """

    number: int
    loss: Tensor
    preservation: Tensor | None
    checkpointed: int


@dataclass
class TrainState:
    """What is trained, what it is trained with, and how many steps were made."""

    denoiser: Denoiser
    prompt_embeds: PromptEmbeds
    lora: list[nn.Parameter]
    lora_optimizer: torch.optim.Optimizer | FlatOptimizer
    sampler: BatchSampler
    checkpointing: BlockCheckpointing
    passes: Passes
    token_optimizer: TokenOptimizer | None = None
    compiled: CompiledBlocks | None = None
    step: int = 0

    @property
    def transformer(self) -> nn.Module:
        """The transformer with its LoRA."""
        return self.denoiser.transformer

    @property
    def token_rows(self) -> nn.Parameter | None:
        """The placeholder tokens' embeddings (R, D), where tokens are trained."""
        return self.token_optimizer and self.token_optimizer.rows

    @property
    def lever(self) -> int:
        """What can be done for a step that ran out of memory."""
        if self.passes.holds_memory:
            return WITHOUT_GRAPHS
        if not self.checkpointing.all_checkpointed:
            return MORE_CHECKPOINTS
        return UNCAPTURED if self.passes.capturing else HOPELESS

    def save_memory(self, lever: int) -> None:
        """Let steps need less memory."""
        if lever == WITHOUT_GRAPHS:
            self.passes.give_way()
        elif lever == MORE_CHECKPOINTS:
            self.checkpointing.checkpoint_more()
            self.passes.start_again()
        else:
            self.passes.stop_capturing("out of memory")
        free_memory()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "lora": self.lora,
            "lora_optimizer": self.lora_optimizer.state_dict(),
            "token": self.token_optimizer and self.token_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Raises KeyError, ValueError or others where it is not one of such a training."""
        with torch.no_grad():
            for parameter, value in zip(self.lora, state["lora"], strict=True):
                parameter.copy_(value)
        self.lora_optimizer.load_state_dict(state["lora_optimizer"])
        if self.token_optimizer:
            self.token_optimizer.load_state_dict(state["token"])
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]


@dataclass(frozen=True)
class Schedule:
    """How long to train, and when preservation acts.

    In the first `token_only_steps` the token embeddings learn alone. `prior_preservation` is the weight of the preservation
    loss in every `interval`-th step after that.
    """

    steps: int
    token_only_steps: int = 0
    prior_preservation: float = 0.0
    interval: int = 1


def train_steps(state: TrainState, schedule: Schedule, processes: Processes) -> Iterator[Step]:
    """Train from `state.step`, which moves along, to `schedule.steps`.

    The gradient is that of the mean loss over the batches of all processes, plus `prior_preservation` times the mean
    preservation loss of each preserved prompt. The token embeddings' gradient and the LoRA's are handled apart: a shared clip
    would let the tokens' first huge gradients silence the LoRA. A step that runs out of GPU memory in any process is repeated
    in all of them after `save_memory`; torch.OutOfMemoryError is raised in all of them once that can do nothing more.
    """
    for number in range(state.step + 1, schedule.steps + 1):
        lora_learns = number > schedule.token_only_steps
        # The preserved prompts hold no token: while the tokens learn alone there is nothing for them to do.
        preservation = schedule.prior_preservation if lora_learns and number % schedule.interval == 0 else 0.0
        batch = state.sampler.next_batch()
        losses = _computed(partial(gradients, state, processes.shard(batch), len(batch), preservation), state, processes)
        _sum_over_processes(state, losses, any(sample.input_ids != state.sampler.empty_ids for sample in batch), processes)
        if lora_learns:
            torch.nn.utils.clip_grad_norm_(state.lora, LORA_MAX_GRAD_NORM)
            state.lora_optimizer.step()
        if state.token_optimizer is not None:
            state.token_optimizer.step()
        state.step = number
        yield Step(number, losses[0], losses[1] if preservation else None, state.checkpointing.checkpointed)


def gradients(state: TrainState, batch: list[Sample], batch_size: int, prior_preservation: float) -> list[Tensor]:
    """Set the gradients of the LoRA and the token embeddings from `batch`, which is all or a part of `batch_size` samples.

    Returns its share of the mean loss and of the mean preservation loss, summed over the preserved prompts, fp32 ().
    """
    state.passes.zero_grad()
    if state.token_rows is not None:
        state.token_rows.grad = None
    loss, preservation = torch.zeros(2, device=state.denoiser.device).unbind()
    for group in grouped(batch):
        prompts = [sample.input_ids for sample in group]
        loss += _add_gradients(state, group, prompts, flow_matching_losses, 1 / batch_size) / batch_size
        if not prior_preservation:
            continue
        for prompts in zip(*(sample.example.preserved for sample in group), strict=True):
            weight = prior_preservation / batch_size
            preservation += _add_gradients(state, group, prompts, preservation_losses, weight) / batch_size
    return [loss, preservation]


def _add_gradients(
    state: TrainState, group: list[Sample], prompts: Sequence[tuple[int, ...]], losses: Losses, weight: float
) -> Tensor:
    """Add the gradients of weight * sum of a group's losses with these prompts; returns the sum, which holds until the next."""
    embeds = state.prompt_embeds(prompts)  # (B, T, D)
    inputs = inputs_of(state.denoiser, group, embeds.detach().requires_grad_(embeds.requires_grad))
    total = state.passes.run(losses, (state.denoiser, group[0].example.grid), inputs, weight)
    if embeds.requires_grad:
        embeds.backward(inputs.prompt_embeds.grad)
    return total


def _computed(compute: Callable[[], list[Tensor]], state: TrainState, processes: Processes) -> list[Tensor]:
    """What `compute` returns, once it has returned in every process, so that none waits for gradients that never come."""
    while True:
        try:
            found = compute()
            outcome = max(processes.all_gather([DONE]))
            if outcome == DONE:
                return found
        except RuntimeError as error:
            if out_of_memory(error):  # also where it is wrapped in an error of the compiler
                outcome = max(processes.all_gather([state.lever]))
                if outcome == HOPELESS:
                    raise
            elif state.compiled is not None and state.compiled.failed(error):
                state.passes.start_again()
                continue
            else:
                raise
        if outcome == HOPELESS:
            raise torch.OutOfMemoryError("out of memory in another process, with every block checkpointed")
        state.save_memory(outcome)


def _sum_over_processes(state: TrainState, losses: list[Tensor], tokens_learn: bool, processes: Processes) -> None:
    """Sum losses and gradients over the processes in one all-reduce, in place.

    `tokens_learn`: whether any prompt of the batch may hold a placeholder token; otherwise their embeddings have no gradient.
    """
    if processes.world_size == 1:
        return
    tensors = [*losses, *(parameter.grad for parameter in state.lora if parameter.grad is not None)]
    rows = state.token_rows
    if rows is not None and tokens_learn:
        rows.grad = torch.zeros_like(rows) if rows.grad is None else rows.grad  # no prompt of this process holds a token
        tensors.append(rows.grad)
    total = torch.cat([tensor.flatten() for tensor in tensors])
    processes.all_reduce_sum(total)
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

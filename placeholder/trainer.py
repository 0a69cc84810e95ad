"""The training loop: a generator that makes one step after another and yields what each came to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from placeholder.config import TrainConfig
from placeholder.determinism import StrictSteps
from placeholder.devices import stack_on, to_device
from placeholder.exchange import GradientExchange, computed_together
from placeholder.flow import add_noise, flow_loss, sample_sigma, velocity_target
from placeholder.lora import without_lora
from placeholder.memory import BlockCheckpointing
from placeholder.modulations import timestep_device
from placeholder.optimizers import RowOptimizer
from placeholder.processes import Processes

ALONE = Processes()
LORA_MAX_GRAD_NORM = 1.0  # max_grad_norm of diffusers' DreamBooth LoRA scripts

PromptEmbeds = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""From n prompts of one length, as ids, to embeddings (n, T, D)."""


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
    """One element of a batch: an example with the prompt, noise (L, C) and noise level () drawn for it."""

    example: Example
    input_ids: tuple[int, ...]
    noise: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, its loss and its preservation loss, fp32 (), still on the device.

    `preservation` is None where nothing was preserved in this step; `recomputed` is the number of blocks whose activations were recomputed in its backward pass.
    """

    number: int
    loss: Tensor
    preservation: Tensor | None
    recomputed: int


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
        for _ in range(config.batch_size * processes.count)
    ]


def draw_sample(example: Example, empty_ids: tuple[int, ...], caption_dropout: float, generator: torch.Generator) -> Sample:
    """Draw noise, noise level and, with probability `caption_dropout`, the empty prompt."""
    dropped = torch.rand((), generator=generator).item() < caption_dropout
    sigma = sample_sigma(example.mu, generator)
    noise = torch.randn(example.latents.shape, generator=generator)
    return Sample(example, empty_ids if dropped else example.input_ids, noise, sigma)


def grouped(batch: list[Sample]) -> list[list[Sample]]:
    """The batch in groups that can be stacked without padding: of one picture shape and one length of each of their prompts."""
    groups: dict[tuple, list[Sample]] = {}
    for sample in batch:
        lengths = (len(ids) for ids in (sample.input_ids, *sample.example.preserved))
        groups.setdefault((sample.example.grid, *lengths), []).append(sample)
    return list(groups.values())


def sample_losses(transformer: QwenImageTransformer2DModel, prompt_embeds: PromptEmbeds, group: list[Sample]) -> Tensor:
    """The flow-matching loss of each sample of one group: (B,)."""
    latents, noise, sigmas = _stacked(group, transformer.device)
    noisy = add_noise(latents, noise, to_device(sigmas, latents.device))
    embeds = prompt_embeds([sample.input_ids for sample in group])  # (B, T, D)
    model_pred = predict_velocity(transformer, noisy, sigmas, embeds, group[0].example.grid)
    return flow_loss(model_pred, velocity_target(latents, noise), _weights(group, latents.device))


def preservation_losses(
    transformer: QwenImageTransformer2DModel,
    prompt_embeds: PromptEmbeds,
    group: list[Sample],
    prompts: Sequence[tuple[int, ...]],
) -> Tensor:
    """How far the LoRA moves the prediction for other prompts, as ids of one length, at the samples' noisy latents: (B,).

    The target is the base model's own prediction, with the LoRA off; ai-toolkit calls this differential output preservation.
    """
    latents, noise, sigmas = _stacked(group, transformer.device)
    noisy, grid = add_noise(latents, noise, to_device(sigmas, latents.device)), group[0].example.grid
    embeds = prompt_embeds(prompts)  # (B, T, D)
    with torch.no_grad(), without_lora(transformer):
        target = predict_velocity(transformer, noisy, sigmas, embeds, grid)
    return flow_loss(predict_velocity(transformer, noisy, sigmas, embeds, grid), target)


def _weights(group: list[Sample], device: torch.device) -> Tensor | None:
    """The tokens' weights (B, L) of a group on the device; None where no picture of it has a mask."""
    weights = [sample.example.weights for sample in group]
    if all(found is None for found in weights):
        return None
    length = len(group[0].example.latents)
    return stack_on([torch.ones(length) if found is None else found for found in weights], device)


def _stacked(group: list[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, L, C) and noise (B, L, C) of a group on the device, and its sigmas (B,) on the CPU."""
    latents = stack_on([sample.example.latents for sample in group], device)
    noise = stack_on([sample.noise for sample in group], device)
    return latents, noise, torch.stack([sample.sigma for sample in group])


def predict_velocity(
    transformer: QwenImageTransformer2DModel, noisy: Tensor, sigmas: Tensor, prompt_embeds: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The transformer's velocity (B, L, C) for noisy packed latents (B, L, C), sigmas (B,) and embeddings (B, T, D)."""
    with torch.autocast(noisy.device.type, dtype=transformer.dtype, enabled=transformer.dtype == torch.bfloat16):
        return transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=to_device(sigmas, timestep_device(transformer)),
            encoder_hidden_states=prompt_embeds.to(transformer.dtype),
            img_shapes=[[(1, *grid)]] * len(noisy),
            return_dict=False,
        )[0]

"""The noise levels at which a training will ask the transformer, known before its first step because its seed is."""

import torch
from torch import Tensor

from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.model.base import BaseModel
from placeholder.report.samples import sample_sigmas
from placeholder.training.diagnostics import fixed_samples
from placeholder.training.examples import Example, Position, draw_batch
from placeholder.training.flow import MIDDLE_SIGMA


def levels_in_use(
    base: BaseModel,
    config: TrainConfig,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    position: Position,
    processes: Processes,
) -> Tensor:
    """The distinct noise levels (N,), in the transformer's dtype, of this process's steps and of all that is done beside them.

    The steps are drawn once beforehand, by a copy of the position. bf16 has 128 numbers between a level and twice that, so that N stays
    below a thousand there, however long the training is.
    """
    ahead, drawn = position.copy(), [torch.tensor(MIDDLE_SIGMA)]
    for _ in range(position.step, config.steps):
        drawn += [sample.sigma for sample in processes.shard(draw_batch(examples, empty_ids, config, ahead, processes))]
    if config.tokens:
        drawn += [sample.sigma for sample in fixed_samples(examples)]
    levels = [torch.stack(drawn).to(base.dtype)]
    if config.report:
        levels.append(sample_sigmas(base, config))
    return torch.cat(levels).unique()

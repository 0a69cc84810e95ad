"""Whether compiling the transformer's blocks pays back: a rule of the options and the data set, never of a clock.

A training that is made again, or resumed, decides the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from placeholder.config import TrainConfig
from placeholder.tokens.prompt_encoder import prompt_template
from placeholder.training.examples import Example

TIMES_COST = 2  # compiling has to save more than so many times the seconds that it takes


@dataclass(frozen=True)
class Device:
    """What is known of a kind of device: FLOP/s of the uncompiled step, share of its time that is saved, seconds a compilation."""

    speed: float
    saved_share: float
    seconds: float
    source: str


DEVICES = {
    # benchmarks/step.py on one thread: 7.4 GFLOP in 0.13 s, 7 % faster with sizes left open, 73 s for two compilations.
    "cpu": Device(58e9, 0.07, 36.0, "as measured on one thread"),
    # The share is that of musubi-tuner's PR 722 (5.39 => 4.65 s). The others are assumptions that make little of compiling: the
    # speed is 43 % of an H100's 989 TFLOP/s, and a compilation takes minutes.
    "cuda": Device(425e12, 0.137, 150.0, "assumed, not measured on a GPU"),
}


@dataclass(frozen=True)
class Payback:
    """What compiling would save and cost in a training, in seconds.

    `one_shape`: all pictures are of one height and width, and all prompts of one length.
    """

    flops: float
    compilations: int
    one_shape: bool
    device: Device

    @property
    def saved(self) -> float:
        """Seconds that the steps would take less."""
        return self.flops / self.device.speed * self.device.saved_share

    @property
    def cost(self) -> float:
        """Seconds that compiling would take."""
        return self.compilations * self.device.seconds

    @property
    def pays(self) -> bool:
        """Whether the rule says to compile."""
        return self.saved > TIMES_COST * self.cost

    def line(self, wanted: bool | None) -> str:
        """The decision in a sentence; `wanted` is what was asked for, None for the rule."""
        if wanted is not None:
            return f"Compile: {'on' if wanted else 'off'}, as torch_compile says"
        return (
            f"Compile: {'on' if self.pays else 'off'}, by rule: of {self.flops / 1e12:.3g} TFLOP it would save {self.saved:.3g} s and take "
            f"{self.cost:.3g} s ({self.device.source}); it has to save more than {TIMES_COST} times that"
        )


def payback(
    config: TrainConfig,
    shapes: Sequence[tuple[tuple[int, int], int, Sequence[int]]],
    empty: int,
    transformer: Mapping[str, Any],
    device_type: str,
) -> Payback:
    """What compiling would mean for a training whose examples come equally often.

    `shapes` holds for each example its picture's height and width in tokens, the tokens of its prompt, and those of each prompt that
    is preserved; `empty` is the number of the empty prompt's. `transformer` is the transformer's configuration.
    """
    total = 0.0
    for grid, prompt, preserved in shapes:
        lengths = [prompt, *preserved]
        parts = [step_flops(transformer, math.prod(grid) + length, config.rank) for length in lengths]
        total += parts[0] + sum(parts[1:]) / config.prior_preservation_interval
    dropped = [empty] if config.caption_dropout else []
    one_shape = len({grid for grid, _, _ in shapes}) == 1 and (
        len({length for _, prompt, preserved in shapes for length in (prompt, *preserved, *dropped)}) == 1
    )
    # The first block is compiled for text embeddings without gradients, and with them where a text encoder's rows learn.
    first_blocks = 2 if config.tokens and (config.caption_dropout or config.preserves) else 1
    compilations = len(batch_sizes(config, one_shape)) * (first_blocks + 1)
    flops = config.steps * config.batch_size * total / len(shapes)
    return Payback(flops, compilations, one_shape, DEVICES[device_type])


def batch_sizes(config: TrainConfig, one_shape: bool) -> list[int]:
    """The batch sizes that are compiled apart: one, and two for all larger ones; of one shape, a batch is never divided."""
    return [config.batch_size] if one_shape else sorted({1, min(2, config.batch_size)})


def step_flops(transformer: Mapping[str, Any], tokens: int, rank: int) -> float:
    """FLOPs of a training step of batch 1 over so many tokens, picture's and prompt's, without recomputation.

    Forwards: 12 width^2 multiplications a token in linear layers, 8 rank x width in the LoRA, attention over all pairs.
    Backwards: as much again for the inputs of linear layers, twice the LoRA, 2.5 times the attention.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    linear = 2 * 12 * width**2 * tokens
    attention = 4 * tokens**2 * width
    lora = 4 * 2 * 2 * rank * width * tokens
    return transformer["num_layers"] * (2 * linear + 3.5 * attention + 3 * lora)


def payback_of(
    config: TrainConfig,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    transformer: nn.Module,
    log: Callable[[str], None],
) -> Payback:
    """Whether compiling would pay back, which the log says too."""

    def length(ids: tuple[int, ...]) -> int:
        return len(ids) - prompt_template()[2]

    shapes = [(example.grid, length(example.input_ids), [length(ids) for ids in example.preserved]) for example in examples]
    found = payback(config, shapes, length(empty_ids), transformer.config, transformer.device.type)
    log(found.line(config.torch_compile))
    return found

"""How a training is fitted into memory, and what is said of one that does not fit, before any weight is loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from placeholder.config import TrainConfig
from placeholder.devices import KEPT_FREE
from placeholder.model.base import BaseModel
from placeholder.model.vae import PIXELS_A_TOKEN
from placeholder.training.needs import Need, training_needs
from placeholder.transformer.checkpointing import BlockCheckpointing

GB = 1e9
SMALLER_SIDES = (768, 512)  # pixels: what is proposed where a resolution does not fit


@dataclass(frozen=True)
class Plan:
    """The needs of one training by quantization, how many bytes are free for them, and which of them it takes."""

    title: str
    needs: tuple[Need, ...]
    free: int
    chosen: Need

    @property
    def kept(self) -> int:
        """Bytes that are left alone."""
        return round(self.free * KEPT_FREE / (1 - KEPT_FREE))

    def as_before(self, tabled: bool | None) -> "Plan":
        """With a table of the modulations, or without one, as the training was begun that is resumed, where that fits too."""
        alike = [need for need in self.needs if (need.quantization, need.tabled) == (self.chosen.quantization, tabled)]
        return replace(self, chosen=alike[0]) if alike and alike[0].fits(self.free) else self

    def checkpointing(
        self,
        transformer: nn.Module,
        lora: list[nn.Parameter],
        states: int,
        free: int,
        log: Callable[[str], None],
    ) -> BlockCheckpointing:
        """As few checkpointed blocks as a full batch of the largest crop allows where `free` bytes are free once all is loaded.

        `states` is how many numbers the optimizer keeps for each parameter.
        """
        exchanged = (
            1 if torch.distributed.is_initialized() else 0
        )  # the gradients once more: memory reserved for their exchange
        gradients_and_states = (1 + states + exchanged) * sum(p.nbytes for p in lora)
        free -= self.kept + gradients_and_states
        need = self.chosen
        checkpointed = need.footprint.blocks_to_checkpoint(free)
        log(
            f"Memory: {free / 1e9:.3g} GB free for activations, a step needs {need.footprint.total(0) / 1e9:.3g} GB: "
            f"{checkpointed} of {need.footprint.blocks} blocks are checkpointed"
        )
        return BlockCheckpointing(transformer, checkpointed)

    def lines(self) -> list[str]:
        """The plan as a table in GB."""
        blocks = self.needs[0].footprint.blocks
        checkpointed = [need.checkpointed(self.free) for need in self.needs]
        rows = [
            ("GB expected", [f"{need.name}{' *' if need == self.chosen else ''}" for need in self.needs]),
            ("transformer", [_gb(need.transformer) for need in self.needs]),
            ("text encoder", [_gb(need.text_encoder) for need in self.needs]),
            ("LoRA, gradients, optimizer", [_gb(need.lora) for need in self.needs]),
            ("activations", [_gb(need.footprint.total(count)) for need, count in zip(self.needs, checkpointed, strict=True)]),
            ("peak", [_gb(need.peak(count)) for need, count in zip(self.needs, checkpointed, strict=True)]),
            (f"blocks checkpointed, of {blocks}", [str(count) for count in checkpointed]),
        ]
        lines = [f"Memory plan for {self.title}; {_gb(self.free)} GB may be used; * is what this training takes"]
        return lines + [f"  {name:<28}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows]


def plan_training(base: BaseModel, config: TrainConfig, grid: tuple[int, int], ids: int, free: int, processes: int = 1) -> Plan:
    """Choose the quantization of the transformer's weights: none, or with `quantize` the most precise one that fits.

    On a GPU the modulations become a table where that spares recomputing. `grid` is the height and width in image tokens of the
    largest crop, `ids` the length of the longest prompt with its template, `free` the free bytes of the device. Raises ValueError, with
    what would fit, where nothing does.
    """
    usable = round((1 - KEPT_FREE) * free)
    needs = training_needs(base, config, grid, ids, processes)
    allowed = _allowed(needs, config)
    title = _title(config, grid)
    fitting = [need for need in allowed if need.fits(usable)]
    if fitting:
        alike = [need for need in fitting if need.quantization == fitting[0].quantization]
        return Plan(title, needs, usable, min(alike, key=lambda need: need.checkpointed(usable)))
    smallest = allowed[-1]
    raise ValueError(
        f"{title} needs {_gb(smallest.peak(smallest.footprint.blocks))} GB, {_gb(usable)} GB may be used: "
        f"{_remedy(base, config, grid, ids, usable, needs, processes)}"
    )


def _remedy(
    base: BaseModel,
    config: TrainConfig,
    grid: tuple[int, int],
    ids: int,
    usable: int,
    needs: tuple[Need, ...],
    processes: int,
) -> str:
    """What would fit instead: no autocaption, quantizing, a smaller resolution, both, no token; otherwise how large a GPU has to be."""
    if config.autocaption:
        found = training_needs(base, replace(config, autocaption=False), grid, ids, processes)
        if any(need.fits(usable) for need in _allowed(found, config)):
            return "set autocaption to false, which needs the text encoder's vision tower too, and write captions"
    if not config.quantize and any(need.fits(usable) for need in _quantized(needs)):
        return "set quantize to true"
    for side in SMALLER_SIDES:
        smaller = (side // PIXELS_A_TOKEN, side // PIXELS_A_TOKEN)
        if math.prod(smaller) < math.prod(grid):
            found = training_needs(base, config, smaller, ids, processes)
            if any(need.fits(usable) for need in _allowed(found, config)):
                return f"set resolution to {side}"
            if any(need.fits(usable) for need in _quantized(found)):
                return f"set resolution to {side} and quantize to true"
    if config.tokens:
        without = replace(config, train_placeholder_token=False, quantize=True)
        if any(need.fits(usable) for need in _quantized(training_needs(base, without, grid, ids, processes))):
            return "set quantize to true and train without the token, so that the text encoder need not stay"
    least = min(need.peak(need.footprint.blocks) for need in needs)
    return f"take a GPU with {least / (1 - KEPT_FREE) / GB:.0f} GB free, and set quantize to true"


def _allowed(needs: tuple[Need, ...], config: TrainConfig) -> list[Need]:
    return [need for need in needs if (need.quantization != "none") == config.quantize]


def _quantized(needs: tuple[Need, ...]) -> list[Need]:
    return [need for need in needs if need.quantization != "none"]


def _title(config: TrainConfig, grid: tuple[int, int]) -> str:
    token = "with a token" if config.tokens else "without a token"
    return f"training at {grid[1] * PIXELS_A_TOKEN}x{grid[0] * PIXELS_A_TOKEN} pixels, batch {config.batch_size}, rank {config.rank}, {token}"


def _gb(number: int) -> str:
    return f"{number / GB:.1f}" if number >= GB else f"{number / GB:.3f}"

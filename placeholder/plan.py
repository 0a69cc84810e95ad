"""What a training will need in memory, counted from the model's configuration before any weight is loaded."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from placeholder.config import TrainConfig
from placeholder.lora import add_lora
from placeholder.memory import KEPT_FREE, Footprint, measure
from placeholder.models import BaseModel, text_encoder_shell, transformer_shell
from placeholder.optimizers import STATES
from placeholder.placeholder_token import PlaceholderTokens
from placeholder.prompts import PromptEmbeddings, prompt_template
from placeholder.sight import seeing_bytes
from placeholder.storage import STORAGES, Storage, stored_bytes, unpacked_bytes
from placeholder.trainer import Example, draw_sample, sample_losses

GB = 1e9
SMALLER_SIDES = (768, 512)  # pixels: what is proposed where a resolution does not fit
SIDE_OF_TOKEN = 16  # pixels


@dataclass(frozen=True)
class Need:
    """Bytes that a training needs with the transformer's weights in one storage.

    `encoding` is the height before training, while the captions are encoded or made; `text_encoder` is what of it stays.
    """

    storage: Storage
    encoding: int
    transformer: int
    text_encoder: int
    lora: int
    footprint: Footprint

    @property
    def fixed(self) -> int:
        """What does not depend on how many blocks are recomputed."""
        return self.transformer + self.text_encoder + self.lora

    def recomputed(self, free: int) -> int:
        """How many blocks have to be recomputed to fit into `free` bytes; all, if that is not enough."""
        return self.footprint.blocks_to_recompute(free - self.fixed)

    def peak(self, recomputed: int) -> int:
        """The height over the whole training."""
        return max(self.encoding, self.fixed + self.footprint.total(recomputed))

    def fits(self, free: int) -> bool:
        """Whether it fits into `free` bytes with every block recomputed."""
        return self.peak(self.footprint.blocks) <= free


@dataclass(frozen=True)
class Plan:
    """The needs of one training by storage, how many bytes are free for them, and the storage that was chosen."""

    title: str
    needs: tuple[Need, ...]
    free: int
    storage: Storage

    @property
    def kept(self) -> int:
        """Bytes that are left alone."""
        return round(self.free * KEPT_FREE / (1 - KEPT_FREE))

    @property
    def chosen(self) -> Need:
        """The need with the storage that was chosen."""
        return next(need for need in self.needs if need.storage == self.storage)

    def lines(self) -> list[str]:
        """The plan as a table in GB."""
        blocks = self.needs[0].footprint.blocks
        recomputed = [need.recomputed(self.free) for need in self.needs]
        rows = [
            ("GB expected", [f"{need.storage}{' *' if need.storage == self.storage else ''}" for need in self.needs]),
            ("transformer", [_gb(need.transformer) for need in self.needs]),
            ("text encoder", [_gb(need.text_encoder) for need in self.needs]),
            ("LoRA, gradients, optimizer", [_gb(need.lora) for need in self.needs]),
            ("activations", [_gb(need.footprint.total(count)) for need, count in zip(self.needs, recomputed, strict=True)]),
            ("peak", [_gb(need.peak(count)) for need, count in zip(self.needs, recomputed, strict=True)]),
            (f"blocks recomputed, of {blocks}", [str(count) for count in recomputed]),
        ]
        lines = [f"Memory plan for {self.title}; {_gb(self.free)} GB may be used; * is what this training takes"]
        return lines + [f"  {name:<28}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows]


def plan_training(base: BaseModel, config: TrainConfig, grid: tuple[int, int], ids: int, free: int, processes: int = 1) -> Plan:
    """Choose how the transformer's weights are stored: as they are, or with `quantize` the best storage that fits.

    `grid` is the height and width in image tokens of the largest crop, `ids` the length of the longest prompt with its
    template, `free` the free bytes of the device. Raises ValueError, with what would fit, where nothing does.
    """
    usable = round((1 - KEPT_FREE) * free)
    needs = training_needs(base, config, grid, ids, processes)
    allowed = [need for need in needs if (need.storage != "full") == config.quantize]
    title = _title(config, grid)
    for need in allowed:
        if need.fits(usable):
            return Plan(title, needs, usable, need.storage)
    smallest = allowed[-1]
    raise ValueError(
        f"{title} needs {_gb(smallest.peak(smallest.footprint.blocks))} GB, {_gb(usable)} GB may be used: "
        f"{_remedy(base, config, grid, ids, usable, needs, processes)}"
    )


def training_needs(
    base: BaseModel, config: TrainConfig, grid: tuple[int, int], ids: int, processes: int = 1
) -> tuple[Need, ...]:
    """What the training needs with each storage, the largest first; for the arguments see `plan_training`."""
    transformer, text_encoder = transformer_shell(base), text_encoder_shell(base)
    weights = {storage: stored_bytes(transformer, transformer.transformer_blocks, storage) for storage in STORAGES}
    encoder_bytes = stored_bytes(text_encoder, text_encoder.layers, "int8" if config.quantize_te else "full")
    encoding = stored_bytes(text_encoder, text_encoder.layers, "full")
    if config.autocaption:
        encoding = max(encoding, seeing_bytes(base))
    with hollow_step(transformer, text_encoder, config, grid, ids) as loss:
        footprint = measure(transformer, loss, text_encoder.parameters())
    copies = 1 + STATES[config.optimizer] + (processes > 1)  # the gradients once more while the processes add them up
    lora = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    needs = []
    for storage in STORAGES:
        # What autograd keeps of a layer whose stored weight is unpacked for each use.
        unpacked = unpacked_bytes(transformer.transformer_blocks[-1], storage)
        needs.append(
            Need(
                storage,
                encoding=encoding,
                transformer=weights[storage],
                text_encoder=encoder_bytes if config.tokens else 0,
                lora=(1 + copies) * lora * torch.float32.itemsize,
                footprint=replace(footprint, block=footprint.block + unpacked),
            )
        )
    return tuple(needs)


@contextmanager
def hollow_step(
    transformer: QwenImageTransformer2DModel, text_encoder: nn.Module, config: TrainConfig, grid: tuple[int, int], ids: int
) -> Iterator[Callable[[], Tensor]]:
    """Put a LoRA on the shells and yield a function that computes a step's loss with tensors of shapes and no contents."""
    with torch.device("meta"):
        add_lora(transformer, config.rank, seed=0)
    width, channels = text_encoder.config.hidden_size, transformer.config.in_channels
    tokens = PlaceholderTokens(0, {token: torch.zeros(1, width) for token in config.tokens}, width)
    prompt = (0,) + (len(tokens.rows),) * (ids - 1)  # one placeholder, if there is any, and otherwise ids that none has
    example = Example(torch.zeros(grid[0] * grid[1], channels), grid, 0.0, prompt)
    batch = [draw_sample(example, (), 0.0, torch.Generator().manual_seed(0))] * config.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill_with_fakes([transformer, text_encoder] if config.tokens else [transformer])
        cached = torch.zeros(
            1, ids - prompt_template()[2], width
        )  # what a caption without a token becomes once, before training
        prompt_embeds = (
            PromptEmbeddings(text_encoder, tokens) if config.tokens else lambda prompts: cached.expand(len(prompts), -1, -1)
        )
        yield lambda: sample_losses(transformer, prompt_embeds, batch).sum()


def _fill_with_fakes(modules: list[nn.Module]) -> None:
    """Give every parameter and buffer on the meta device a fake one on the CPU, whose attention keeps what a GPU's keeps."""
    for module in (part for whole in modules for part in whole.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _remedy(
    base: BaseModel,
    config: TrainConfig,
    grid: tuple[int, int],
    ids: int,
    usable: int,
    needs: tuple[Need, ...],
    processes: int,
) -> str:
    """What would fit instead: no autocaption, quantising, a smaller resolution, both, no token; otherwise how large a GPU has to be."""
    if config.autocaption:
        found = training_needs(base, replace(config, autocaption=False), grid, ids, processes)
        if any(need.fits(usable) for need in found if (need.storage != "full") == config.quantize):
            return "set autocaption to false, which needs the text encoder's vision tower too, and write captions"
    if not config.quantize and any(need.fits(usable) for need in needs[1:]):
        return "set quantize to true"
    for side in SMALLER_SIDES:
        smaller = (side // SIDE_OF_TOKEN, side // SIDE_OF_TOKEN)
        if math.prod(smaller) < math.prod(grid):
            found = training_needs(base, config, smaller, ids, processes)
            if any(need.fits(usable) for need in found if (need.storage != "full") == config.quantize):
                return f"set resolution to {side}"
            if any(need.fits(usable) for need in found[1:]):
                return f"set resolution to {side} and quantize to true"
    if config.tokens:
        without = replace(config, train_placeholder_token=False, quantize=True)
        if any(need.fits(usable) for need in training_needs(base, without, grid, ids, processes)[1:]):
            return "set quantize to true and train without the token, so that the text encoder need not stay"
    least = min(need.peak(need.footprint.blocks) for need in needs)
    return f"take a GPU with {least / (1 - KEPT_FREE) / GB:.0f} GB free, and set quantize to true"


def _title(config: TrainConfig, grid: tuple[int, int]) -> str:
    token = "with a token" if config.tokens else "without a token"
    return f"training at {grid[1] * SIDE_OF_TOKEN}x{grid[0] * SIDE_OF_TOKEN} pixels, batch {config.batch_size}, rank {config.rank}, {token}"


def _gb(number: int) -> str:
    return f"{number / GB:.1f}" if number >= GB else f"{number / GB:.3f}"

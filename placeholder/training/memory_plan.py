"""The GPU memory of a training, counted from the model's configuration before any weight is loaded, and how to fit into it."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from placeholder.config import TrainConfig
from placeholder.devices import KEPT_FREE
from placeholder.lora.adapter import add_lora
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.captioner import vlm_bytes
from placeholder.model.loading import text_encoder_bytes, text_encoder_shell, transformer_bytes, transformer_shell
from placeholder.model.offloading import checkpoint_layers
from placeholder.model.quantization import QUANTIZATIONS, Quantization, dequantized_bytes
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEncoder
from placeholder.training.examples import Example, draw_sample
from placeholder.training.losses import Denoiser, sample_losses
from placeholder.training.optimizers import STATES
from placeholder.transformer.checkpointing import BlockCheckpointing, Footprint, measure
from placeholder.transformer.modulations import depend_on_timestep_alone, row_bytes

GB = 1e9
Grid = tuple[int, int]  # height and width in image tokens
# FakeTensors of the CPU alone: where a CUDA build of torch finds no GPU, the second thread that prepares for CUDA's crashes.
HostFakes = type("HostFakes", (FakeTensorMode,), {"avoid_device_init": False})


@dataclass(frozen=True)
class Need:
    """Bytes that a training needs with the transformer quantized in one way, its modulations `tabled` or not.

    `encoding` is the peak before training, while the text encoder is whole or captions images; `text_encoder` is what of it
    stays. Its last `offloaded` layers stay in host memory, and each is on the GPU while it computes, forward and backward.
    """

    quantization: Quantization
    tabled: bool
    encoding: int
    transformer: int
    text_encoder: int
    lora: int
    footprint: Footprint
    offloaded: int = 0

    @property
    def name(self) -> str:
        """What the table of the plan calls it."""
        return f"{self.quantization}+table" if self.tabled else self.quantization

    def checkpointed(self, free: int) -> int:
        """How many blocks have to be checkpointed to fit into `free` bytes; all, if that is not enough."""
        return self.footprint.blocks_to_checkpoint(free - self.transformer - self.text_encoder - self.lora)

    @property
    def least(self) -> int:
        """Peak memory with all blocks checkpointed."""
        return self.peak(self.footprint.blocks)

    def peak(self, checkpointed: int) -> int:
        """Peak memory of the whole training."""
        step = self.transformer + self.text_encoder + self.lora + self.footprint.total(checkpointed)
        return max(self.encoding, step)


@dataclass(frozen=True)
class Plan:
    """The needs of one training by quantization, how many bytes it may use, and which need it takes."""

    title: str
    needs: tuple[Need, ...]
    free: int
    chosen: Need

    def checkpointing(self, transformer: nn.Module, lora: list[nn.Parameter], optimizer: str, free: int) -> BlockCheckpointing:
        """As few checkpointed blocks as a full batch of the largest crop allows, with `free` bytes free once all is loaded."""
        reserve = self.free * KEPT_FREE / (1 - KEPT_FREE)
        gradients_and_states = (1 + STATES[optimizer]) * sum(parameter.nbytes for parameter in lora)
        checkpointed = self.chosen.footprint.blocks_to_checkpoint(int(free - reserve - gradients_and_states))
        return BlockCheckpointing(transformer, checkpointed)

    def lines(self) -> list[str]:
        """The plan as a table in GB."""
        offloaded = self.chosen.offloaded
        counts = [need.checkpointed(self.free) for need in self.needs]
        rows = [
            ("GB expected", [f"{need.name}{' *' if need == self.chosen else ''}" for need in self.needs]),
            ("transformer", [_gb(need.transformer) for need in self.needs]),
            (f"text encoder{f', {offloaded} offloaded' if offloaded else ''}", [_gb(need.text_encoder) for need in self.needs]),
            ("LoRA, gradients, optimizer", [_gb(need.lora) for need in self.needs]),
            ("activations", [_gb(need.footprint.total(count)) for need, count in zip(self.needs, counts, strict=True)]),
            ("peak", [_gb(need.peak(count)) for need, count in zip(self.needs, counts, strict=True)]),
            (f"checkpointed blocks, of {self.needs[0].footprint.blocks}", [str(count) for count in counts]),
        ]
        lines = [f"Memory plan for {self.title}; {_gb(self.free)} GB may be used; * is what this training takes"]
        slower = f"Warning: {offloaded} layers of the text encoder do not fit: each is copied to the GPU whenever it computes"
        lines += [f"  {name:<28}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows]
        return lines + [slower] * (offloaded > 0)


def plan_memory(
    base: BaseModel, config: TrainConfig, grid: Grid, ids: int, free: int, stored: tuple[Quantization, bool] | None = None
) -> Plan:
    """Choose the transformer's quantization (with `quantize` the best that fits) and whether its modulations become a table.

    `grid` is that of the largest crop, `ids` the length of the longest prompt with its template, `free` the free bytes of the
    device, `stored` how a resumed checkpoint was made. Where nothing fits, as few of the text encoder's layers as possible are
    offloaded. Raises ValueError where that does not help, and where no need is as `stored`.
    """
    usable = round((1 - KEPT_FREE) * free)
    wanted = [stored] if stored else list(product(QUANTIZATIONS[1:] if config.quantize else QUANTIZATIONS[:1], (False, True)))
    count = partial(memory_needs, base, config, grid, ids)

    def fitting(needs: tuple[Need, ...], most: float = usable, share: float = 1) -> list[Need]:
        return [n for n in needs if (n.quantization, n.tabled) in wanted and n.peak(int(share * n.footprint.blocks)) <= most]

    needs = count()
    if not fitting(needs) and base.device.type != "cpu" and not config.quantize_te:
        layers = len(text_encoder_shell(base).layers)
        if best := fitting(needs := count(layers))[:1]:
            wanted = [kind for kind in wanted if kind[0] == best[0].quantization]
            # An eighth of the blocks is left to checkpoint, for a step that runs out of memory all the same.
            needs = count(1 + bisect_left(range(1, layers), True, key=lambda n: bool(fitting(count(n), share=7 / 8))))
    side = "{1}x{0}".format(*(QWEN_IMAGE.pixels_per_token * tokens for tokens in grid))
    token = "with" if config.tokens else "without"
    title = f"training at {side} pixels, batch {config.batch_size}, rank {config.rank}, {token} a token"
    if not (allowed := fitting(needs, math.inf)):
        raise ValueError("the checkpoint was made on another kind of device: resume where it was made, on a GPU or a CPU")
    if not (found := fitting(needs)):
        levers = ", or ".join(_levers(config, needs, allowed[-1], usable))
        raise ValueError(f"{title} needs {_gb(allowed[-1].least)} GB, {_gb(usable)} GB may be used: {levers}")
    return Plan(title, needs, usable, min(found, key=lambda n: (QUANTIZATIONS.index(n.quantization), n.checkpointed(usable))))


def _levers(config: TrainConfig, needs: tuple[Need, ...], need: Need, usable: int) -> list[str]:
    """What to change about a training that does not fit, though with the smallest `need` that its options allow."""
    if config.autocaption and need.encoding > usable:
        return ["set autocaption to false and write the captions", "take a larger GPU"]
    quantized = not config.quantize and any(other.least <= usable for other in needs if other.quantization != "none")
    smaller = "give a smaller resolution" + " or batch_size" * (config.batch_size > 1)
    return ["set quantize to true"] * quantized + [smaller, "take a larger GPU"]


def memory_needs(base: BaseModel, config: TrainConfig, grid: Grid, ids: int, offloaded: int = 0) -> tuple[Need, ...]:
    """What the training needs with each quantization, the largest first, with so many layers of the text encoder offloaded.

    On a GPU quantized weights have their modulations tabled, others come with a table and without. See `plan_memory`.
    """
    transformer = transformer_shell(base)
    rows, blocks = config.batch_size * row_bytes(transformer), transformer.transformer_blocks
    text_encoder = text_encoder_bytes(base, "int8" if config.quantize_te else "none", offloaded)
    footprint, lora = step_footprint(base, config.rank, config.batch_size, config.tokens, grid, ids, offloaded)
    variants = [(kind, False) for kind in QUANTIZATIONS]
    if base.device.type != "cpu" and depend_on_timestep_alone(transformer):  # on a CPU a table would lie in the same memory
        variants = [("none", False), *((kind, True) for kind in QUANTIZATIONS)]
    return tuple(
        Need(
            kind,
            tabled,
            encoding=vlm_bytes(base) if config.autocaption else text_encoder,
            transformer=transformer_bytes(transformer, kind, tabled),
            text_encoder=text_encoder if config.tokens else 0,
            lora=(2 + STATES[config.optimizer]) * lora * torch.float32.itemsize,  # weights, gradients, the optimizer's states
            footprint=replace(footprint, rest=footprint.rest + tabled * rows + dequantized_bytes(blocks, kind)),
            offloaded=offloaded,
        )
        for kind, tabled in variants
    )


@lru_cache(maxsize=16)
def step_footprint(
    base: BaseModel, rank: int, batch_size: int, tokens: tuple[str, ...], grid: Grid, ids: int, offloaded: int
) -> tuple[Footprint, int]:
    """What autograd keeps of a step, and the number of the LoRA's parameters; counted once for trainings of the same shapes."""
    transformer, text_encoder = transformer_shell(base), text_encoder_shell(base)
    checkpoint_layers(text_encoder.layers[len(text_encoder.layers) - offloaded :])
    blocks = len(transformer.transformer_blocks)
    counted = transformer.transformer_blocks = transformer.transformer_blocks[:2]  # they are alike
    with fake_step(transformer, text_encoder, rank, batch_size, tokens, grid, ids) as loss:
        footprint = measure(transformer, loss, text_encoder.parameters())
    lora = sum(parameter.numel() for parameter in counted.parameters() if parameter.requires_grad) // len(counted)
    casts = lora * base.dtype.itemsize * (base.dtype != torch.float32)  # of a block, also of a checkpointed one
    kept = footprint.checkpointed_block + casts
    return replace(footprint, blocks=blocks, checkpointed_block=kept, lora=2 * casts * blocks), lora * blocks


@contextmanager
def fake_step(
    transformer: nn.Module, text_encoder: nn.Module, rank: int, batch_size: int, names: tuple[str, ...], grid: Grid, ids: int
) -> Iterator[Callable[[], Tensor]]:
    """Add a LoRA to the shells and yield a function that computes a step's loss on FakeTensors, which have no contents.

    `names` are the placeholder tokens; for the others see `plan_memory`.
    """
    with torch.device("meta"):
        add_lora(transformer, rank, seed=0)
    width, channels = text_encoder.config.hidden_size, transformer.config.in_channels
    tokens = PlaceholderTokens(0, {token: torch.zeros(1, width) for token in names}, width)
    prompt = (0,) + (len(tokens.rows),) * (ids - 1)  # one placeholder, if there is any, and otherwise ids that none has
    example = Example(torch.zeros(grid[0] * grid[1], channels), grid, 0.0, prompt)
    batch = [draw_sample(example, (), 0.0, torch.Generator().manual_seed(0))] * batch_size
    with HostFakes(allow_non_fake_inputs=True):
        for module in [transformer, text_encoder] if names else [transformer]:
            module.to_empty(device="cpu")  # FakeTensors that claim to be there: their attention keeps what a GPU's keeps
        cached = torch.zeros(1, ids - QWEN_IMAGE.dropped_tokens, width)  # of a prompt without a token, computed once
        prompt_embeds = PromptEncoder(text_encoder, tokens) if names else lambda prompts: cached.expand(len(prompts), -1, -1)
        yield lambda: sample_losses(Denoiser(transformer), prompt_embeds, batch).sum()


def _gb(number: int) -> str:
    return f"{number / GB:.1f}" if number >= GB else f"{number / GB:.3f}"

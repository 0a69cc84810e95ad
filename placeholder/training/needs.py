"""What a training needs in memory, counted from the model's configuration before any weight is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from placeholder.config import TrainConfig
from placeholder.lora.adapter import add_lora
from placeholder.model.base import BaseModel
from placeholder.model.captioner import vlm_bytes
from placeholder.model.loading import text_encoder_shell, transformer_shell
from placeholder.model.quantization import QUANTIZATIONS, Quantization, quantized_bytes
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEmbeddings, prompt_template
from placeholder.training.examples import Example, draw_sample
from placeholder.training.losses import sample_losses
from placeholder.training.optimizers import STATES
from placeholder.transformer.checkpointing import Footprint, measure
from placeholder.transformer.modulations import depend_on_noise_alone, modulation_layers, row_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that a training needs on the device with the transformer's weights in one quantization, its modulations `tabled` or not.

    `encoding` is the height before training, while the captions are encoded or made; `text_encoder` is what of it stays.
    """

    quantization: Quantization
    tabled: bool
    encoding: int
    transformer: int
    text_encoder: int
    lora: int
    footprint: Footprint

    @property
    def name(self) -> str:
        """What the table of the plan calls it."""
        return f"{self.quantization}+table" if self.tabled else self.quantization

    @property
    def fixed(self) -> int:
        """What does not depend on how many blocks are checkpointed."""
        return self.transformer + self.text_encoder + self.lora

    def checkpointed(self, free: int) -> int:
        """How many blocks have to be checkpointed to fit into `free` bytes; all, if that is not enough."""
        return self.footprint.blocks_to_checkpoint(free - self.fixed)

    def peak(self, checkpointed: int) -> int:
        """The height over the whole training."""
        return max(self.encoding, self.fixed + self.footprint.total(checkpointed))

    def fits(self, free: int) -> bool:
        """Whether it fits into `free` bytes with every block checkpointed."""
        return self.peak(self.footprint.blocks) <= free


def training_needs(
    base: BaseModel, config: TrainConfig, grid: tuple[int, int], ids: int, processes: int = 1
) -> tuple[Need, ...]:
    """What the training needs with each quantization, the largest first; for the arguments see `plan.plan_training`.

    On a GPU quantized weights have their modulations tabled; weights that are not quantized come with both.
    """
    transformer, text_encoder = transformer_shell(base), text_encoder_shell(base)
    weights = {
        quantization: quantized_bytes(transformer, transformer.transformer_blocks, quantization)
        for quantization in QUANTIZATIONS
    }
    embedder = quantized_bytes(transformer.time_text_embed, transformer.time_text_embed, "none")
    replaced = {
        quantization: embedder + sum(quantized_bytes(layer, layer, quantization) for layer in modulation_layers(transformer))
        for quantization in QUANTIZATIONS
    }
    table_row = row_bytes(transformer)
    encoder_bytes = quantized_bytes(text_encoder, text_encoder.layers, "int8" if config.quantize_te else "none")
    encoding = quantized_bytes(text_encoder, text_encoder.layers, "none")
    if config.autocaption:
        encoding = max(encoding, vlm_bytes(base))
    with fake_step(transformer, text_encoder, config, grid, ids) as loss:
        footprint = measure(transformer, loss, text_encoder.parameters())
    copies = 1 + STATES[config.optimizer] + (processes > 1)  # the gradients once more: memory reserved for their exchange
    lora = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    needs = []
    for quantization, tabled in _variants(base.device, transformer):
        needs.append(
            Need(
                quantization,
                tabled,
                encoding=encoding,
                transformer=weights[quantization] - tabled * replaced[quantization],
                text_encoder=encoder_bytes if config.tokens else 0,
                lora=(1 + copies) * lora * torch.float32.itemsize,
                footprint=replace(footprint, rest=footprint.rest + tabled * config.batch_size * table_row),
            )
        )
    return tuple(needs)


def _variants(device: torch.device, transformer: nn.Module) -> list[tuple[Quantization, bool]]:
    """Quantizations and whether the modulations are tabled; on a CPU a table would lie in the same memory."""
    if device.type == "cpu" or not depend_on_noise_alone(transformer):
        return [(quantization, False) for quantization in QUANTIZATIONS]
    return [("none", False), *((quantization, True) for quantization in QUANTIZATIONS)]


@contextmanager
def fake_step(
    transformer: nn.Module, text_encoder: nn.Module, config: TrainConfig, grid: tuple[int, int], ids: int
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

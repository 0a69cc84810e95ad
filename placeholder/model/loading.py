"""Loading the base model's components: on the device, quantized or offloaded, and their shapes without weights."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from placeholder.model.base import BaseModel
from placeholder.model.offloading import stream
from placeholder.model.quantization import Storage, store
from placeholder.model.vae import as_single_frame
from placeholder.transformer.modulations import tabulate


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer alone, loaded once for each BaseModel; no weights are read. Nothing may change it, its users share it."""
    if "tokenizer" not in vars(base):
        with _collector_paused():
            vars(base)["tokenizer"] = base.component(Qwen2Tokenizer, "tokenizer")
    return vars(base)["tokenizer"]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's garbage collector off: it would look through the growing vocabulary over and over, for two thirds of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_scheduler(base: BaseModel) -> FlowMatchEulerDiscreteScheduler:
    """The sampling schedule, whose configuration also holds the constants of the resolution shift."""
    return base.component(FlowMatchEulerDiscreteScheduler, "scheduler")


def shift_constants(base: BaseModel) -> tuple[int, int, float, float]:
    """What `flow.shift_mu` takes after the number of tokens, from the scheduler's configuration."""
    config = load_scheduler(base).config
    return config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift


def load_vae(base: BaseModel, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    """The VAE for single pictures, frozen."""
    vae = as_single_frame(base.component(AutoencoderKLQwenImage, "vae", dtype=dtype, use_safetensors=True))
    return vae.requires_grad_(False).eval().to(base.device)


def load_text_encoder(base: BaseModel, quantize: bool = False, streamed: bool = False) -> nn.Module:
    """The language model inside Qwen2.5-VL, frozen: without the vision tower and the head that computes logits.

    `streamed`: it stays in the host's memory, and its layers go to the device one by one while they compute.
    """
    whole = base.component(Qwen2_5_VLForConditionalGeneration, "text_encoder", dtype=base.dtype, use_safetensors=True)
    return language_model(whole, base, quantize, streamed)


def language_model(
    whole: Qwen2_5_VLForConditionalGeneration, base: BaseModel, quantize: bool = False, streamed: bool = False
) -> nn.Module:
    """What `load_text_encoder` returns, taken out of the whole Qwen2.5-VL; the rest goes with the last reference to that."""
    text_encoder = whole.model.language_model
    if quantize:
        store(text_encoder.layers, "int8", base.dtype, base.device)
    return _placed(text_encoder, base, streamed)


def load_transformer(
    base: BaseModel, storage: Storage = "full", levels: Tensor | None = None, streamed: bool = False
) -> QwenImageTransformer2DModel:
    """The denoising transformer, frozen; for `streamed` see `load_text_encoder`.

    With noise `levels` (N,) its modulations are a table for these in the host's memory, whatever the storage of the other weights.
    """
    transformer = base.component(QwenImageTransformer2DModel, "transformer", dtype=base.dtype, use_safetensors=True)
    if levels is not None:
        tabulate(transformer, levels, base.device)
    store(transformer.transformer_blocks, storage, base.dtype, base.device)
    return _placed(transformer, base, streamed)


def _placed(module: nn.Module, base: BaseModel, streamed: bool) -> nn.Module:
    module.requires_grad_(False).eval()
    if not streamed:
        return module.to(base.device)
    stream(module, base.device)
    return module


def transformer_shell(base: BaseModel) -> QwenImageTransformer2DModel:
    """The transformer's shapes and dtype on the meta device: no weights are read."""
    config = base.configuration(QwenImageTransformer2DModel, "transformer")
    with torch.device("meta"), default_dtype(base.dtype):
        return QwenImageTransformer2DModel.from_config(config).requires_grad_(False)


def text_encoder_shell(base: BaseModel) -> nn.Module:
    """The text encoder's shapes and dtype on the meta device: no weights are read."""
    config = base.configuration(Qwen2_5_VLConfig, "text_encoder")
    with torch.device("meta"), default_dtype(base.dtype):
        return AutoModel.from_config(config.text_config).requires_grad_(False)


def text_width(base: BaseModel) -> int:
    """The width D of the text encoder's embeddings, from its configuration."""
    return base.configuration(Qwen2_5_VLConfig, "text_encoder").text_config.hidden_size


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

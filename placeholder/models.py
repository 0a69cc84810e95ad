"""The base model's components: where they come from, how they are loaded and placed, and how pictures are encoded."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.utils import logging as transformers_logging

from placeholder.download import cached_commit, fetch, split_revision
from placeholder.hooks import stream
from placeholder.latents import normalise, pack
from placeholder.modulations import tabulate
from placeholder.storage import Storage, store
from placeholder.vae import as_single_frame

# Replicate reads progress from log lines that look like a bar; only the training's own may.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

MODEL_VARIABLE = "QWEN_IMAGE_MODEL"
DEFAULT_MODEL = "Qwen/Qwen-Image"
# The head of its main branch, 57.7 GB, since 2025; weights archives and seeds are worth what they were as long as it is this one.
DEFAULT_REVISION = "75e0b4be04f60ec59a75f475837eced720f823b6"


@dataclass(frozen=True)
class BaseModel:
    """Which base model, and where and in which dtype its components run.

    `source`: a folder, or a repository of the hub, there at `revision` (a commit, tag or branch; None for its main branch).
    """

    source: str
    device: torch.device
    dtype: torch.dtype
    revision: str | None = field(default=None, kw_only=True)

    @classmethod
    def from_environment(cls) -> "BaseModel":
        """Folder, hub id or hub id@revision from QWEN_IMAGE_MODEL; bf16 on CUDA, fp32 on a CPU, which only a small model fits.

        Raises ValueError for a malformed revision, and when the full-size model is asked for and there is no CUDA GPU.
        """
        source, revision = split_revision(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
        if source == DEFAULT_MODEL:
            revision = revision or DEFAULT_REVISION
        if torch.cuda.is_available():
            return cls(source, torch.device("cuda"), torch.bfloat16, revision=revision)
        if source == DEFAULT_MODEL:
            raise ValueError(
                f"no CUDA GPU was found and {DEFAULT_MODEL} needs one: run on a GPU, or name a small model in {MODEL_VARIABLE}"
            )
        return cls(source, torch.device("cpu"), torch.float32, revision=revision)

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository that is loaded; None for a folder, and before anything was fetched."""
        return cached_commit(self.source, self.revision)

    def fetch(self, log: Callable[[str], None]) -> None:
        """Have all files at hand before the first is read, fetched side by side from the hub where the source is not a folder."""
        fetch(self.source, log, revision=self.revision)

    def component(self, kind: type, name: str, **options: Any) -> Any:
        """A component of the class `kind` from the base model's subfolder `name`, on the CPU."""
        return kind.from_pretrained(self.source, subfolder=name, **self._pinned(), **options)

    def configuration(self, kind: type, name: str) -> Any:
        """The configuration of a component: a dictionary for a diffusers class, the object for one of transformers."""
        read = kind.load_config if issubclass(kind, ConfigMixin) else kind.from_pretrained
        return read(self.source, subfolder=name, **self._pinned())

    def _pinned(self) -> dict[str, str]:
        """The commit that was fetched, so that all components are of one, also where the branch moves meanwhile."""
        revision = self.commit or self.revision
        return {"revision": revision} if revision else {}


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer alone; no weights are read."""
    with _collector_paused():
        return base.component(Qwen2Tokenizer, "tokenizer")


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


@torch.no_grad()
def encode_picture(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    """A picture, uint8 (3, H, W) => normalised and packed latents, fp32 (H/16 * W/16, 64): the posterior's mode."""
    images = pixels.to(vae.device, vae.dtype)[None, :, None] / 127.5 - 1  # (1, 3, 1, H, W)
    latents = vae.encode(images).latent_dist.mode()[:, :, 0].float()  # (1, 16, H/8, W/8)
    mean, std = (torch.tensor(values, device=latents.device) for values in (vae.config.latents_mean, vae.config.latents_std))
    return pack(normalise(latents, mean, std))[0]

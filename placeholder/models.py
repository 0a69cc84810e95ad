"""The base model's components: where they come from, how they are loaded and placed, and how pictures and prompts are encoded."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DynamicCache,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.utils import logging as transformers_logging

from placeholder.download import cached_commit, fetch, split_revision
from placeholder.hooks import stream
from placeholder.latents import normalise, pack
from placeholder.placeholder_token import PlaceholderTokens
from placeholder.storage import Storage, store
from placeholder.vae import as_single_frame

# Replicate reads progress from log lines that look like a bar; only the training's own may.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

MODEL_VARIABLE = "QWEN_IMAGE_MODEL"
DEFAULT_MODEL = "Qwen/Qwen-Image"
# The head of its main branch, 57.7 GB, since 2025; weights archives and seeds are worth what they were as long as it is this one.
DEFAULT_REVISION = "75e0b4be04f60ec59a75f475837eced720f823b6"
# Classifier-free guidance and caption dropout need a prompt that says nothing; Qwen-Image's own examples use a space.
EMPTY_PROMPT = " "
MAX_PROMPT_TOKENS = 512  # max_sequence_length of QwenImagePipeline.__call__

TemplateStates = list[tuple[Tensor, Tensor]]
"""Of each layer the keys and values (1, heads, T, head width) of the tokens before the prompt."""


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
    return base.component(Qwen2Tokenizer, "tokenizer")


def load_scheduler(base: BaseModel) -> FlowMatchEulerDiscreteScheduler:
    """The sampling schedule, whose configuration also holds the constants of the resolution shift."""
    return base.component(FlowMatchEulerDiscreteScheduler, "scheduler")


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


def load_transformer(base: BaseModel, storage: Storage = "full", streamed: bool = False) -> QwenImageTransformer2DModel:
    """The denoising transformer, frozen; for `streamed` see `load_text_encoder`."""
    transformer = base.component(QwenImageTransformer2DModel, "transformer", dtype=base.dtype, use_safetensors=True)
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


@cache
def prompt_template() -> tuple[str, str, int]:
    """What stands before and after a prompt, and how many tokens of it are dropped from the embeddings, as the pipeline has it."""
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    prefix, suffix = pipeline.prompt_template_encode.split("{}")
    return prefix, suffix, pipeline.prompt_template_encode_start_idx


def prompt_ids(tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, prompt: str) -> tuple[int, ...]:
    """The ids of a prompt inside the template, placeholders spliced in; the one way from text to ids.

    Cut after MAX_PROMPT_TOKENS of the prompt, as the pipeline does. An empty prompt counts as EMPTY_PROMPT.
    """
    prefix, suffix, dropped = prompt_template()
    return tuple(tokens.tokenize(tokenizer, prompt or EMPTY_PROMPT, prefix, suffix)[: dropped + MAX_PROMPT_TOKENS])


def encode_prompts(
    text_encoder: nn.Module, tokens: PlaceholderTokens, input_ids: Tensor, template: TemplateStates | None = None
) -> Tensor:
    """Prompt embeddings (B, T - dropped, D) of ids (B, T) from `prompt_ids`; no padding, so no mask. Gradients reach the rows.

    With the states of the `template` that stands before all of these prompts it is not run again: nothing in it looks at what
    comes after it. The embeddings are the same up to rounding.
    """
    dropped = prompt_template()[2]
    if template is None:
        inputs_embeds = tokens.embed(text_encoder.embed_tokens, input_ids)  # (B, T, D)
        hidden = text_encoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state  # (B, T, D)
        return hidden[:, dropped:]
    inputs_embeds = tokens.embed(text_encoder.embed_tokens, input_ids[:, dropped:])  # (B, T - dropped, D)
    before = DynamicCache([tuple(states.expand(len(input_ids), -1, -1, -1) for states in layer) for layer in template])
    return text_encoder(inputs_embeds=inputs_embeds, past_key_values=before, use_cache=True).last_hidden_state


@torch.no_grad()
def template_states(text_encoder: nn.Module, input_ids: Tensor) -> TemplateStates:
    """The keys and values of ids (1, T) that hold no placeholder."""
    past = DynamicCache(config=text_encoder.config)
    text_encoder(input_ids=input_ids, past_key_values=past, use_cache=True)
    return [(layer.keys, layer.values) for layer in past.layers]


def pipeline_inputs(prompt_embeds: Tensor, negative: Tensor | None = None) -> dict[str, Tensor]:
    """What QwenImagePipeline takes for embeddings (B, T, D) of a prompt and of what guidance leads away from: no padding anywhere."""
    inputs = {}
    for prefix, embeds in (("", prompt_embeds), ("negative_", negative)):
        if embeds is not None:
            inputs[f"{prefix}prompt_embeds"] = embeds
            inputs[f"{prefix}prompt_embeds_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return inputs


class PromptEmbeddings:
    """Prompt embeddings on demand: from the cache where they cannot change, from the text encoder where a row may have."""

    def __init__(self, text_encoder: nn.Module, tokens: PlaceholderTokens):
        self.text_encoder: nn.Module | None = text_encoder
        self.tokens = tokens
        self._cached: dict[tuple[int, ...], Tensor] = {}
        self._templates: dict[tuple[int, ...], TemplateStates] = {}  # one, and more where a prompt begins with a line break

    @torch.no_grad()
    def cache(self, prompts: Iterable[tuple[int, ...]]) -> int:
        """Encode the prompts (as ids) that hold no placeholder, once; returns how many prompts are cached."""
        for ids in prompts:
            if ids not in self._cached and not self.tokens.contains(list(ids)):
                self._cached[ids] = self._encode([ids])[0]
        return len(self._cached)

    def release(self) -> None:
        """Let go of the text encoder; from here on only cached prompts can be had."""
        self.text_encoder = None
        self._templates.clear()

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Embeddings (n, T, D) of n prompts of one length, with gradients to the rows of placeholders."""
        if all(ids in self._cached for ids in prompts):
            return torch.stack([self._cached[ids] for ids in prompts])
        return self._encode(prompts)

    def window(self, prompts: Sequence[tuple[int, ...]]) -> "Window":
        """Embeddings of prompts of any lengths, of which those that may have changed are encoded now, in one call."""
        changed = [ids for ids in dict.fromkeys(prompts) if ids not in self._cached]
        if not changed:
            return Window(self, {})
        longest, dropped = max(map(len, changed)), prompt_template()[2]
        # What is put behind a prompt changes nothing in it: each token looks at those before it alone.
        embeds = self._encode([ids + ids[-1:] * (longest - len(ids)) for ids in changed])  # (n, T, D)
        return Window(self, {ids: found[: len(ids) - dropped] for ids, found in zip(changed, embeds, strict=True)})

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        heads = {ids[: prompt_template()[2]] for ids in prompts}
        template = self._template(heads.pop()) if len(heads) == 1 else None
        return encode_prompts(self.text_encoder, self.tokens, self._ids(prompts), template)

    def _template(self, head: tuple[int, ...]) -> TemplateStates:
        if head not in self._templates:
            self._templates[head] = template_states(self.text_encoder, self._ids([head]))
        return self._templates[head]

    def _ids(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(prompts, device=self.tokens.rows.device)  # (n, T)


class Window:
    """The prompts of one step, encoded once however many parts the step is made in; called like PromptEmbeddings.

    The parts' backward passes end at the embeddings; `backward` goes on from there through the text encoder, once for all.
    """

    def __init__(self, embeddings: PromptEmbeddings, encoded: dict[tuple[int, ...], Tensor]):
        self._embeddings = embeddings
        self._encoded = encoded
        self._ends = {ids: found.detach().requires_grad_(found.requires_grad) for ids, found in encoded.items()}

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Embeddings (n, T, D) of n prompts of one length, each of the step's or a cached one."""
        return torch.stack([self._ends[ids] if ids in self._ends else self._embeddings([ids])[0] for ids in prompts])

    def backward(self) -> None:
        """Add to the gradients of the rows what has come together at the embeddings."""
        reached = [(self._encoded[ids], end.grad) for ids, end in self._ends.items() if end.grad is not None]
        if reached:
            torch.autograd.backward(*zip(*reached, strict=True))

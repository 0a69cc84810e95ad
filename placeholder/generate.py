"""Predictions: the base model in memory, the weights archives that a request asks for, and the image."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from placeholder.data.captions import with_token
from placeholder.devices import KEPT_FREE
from placeholder.errors import Log, readable_errors
from placeholder.lora.distilled import FastLora, line_of
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_scheduler, load_text_encoder, load_tokenizer, load_transformer, load_vae
from placeholder.model.offloading import stop_caching
from placeholder.model.placement import placement_of
from placeholder.model.vae import tile_where_needed
from placeholder.options import MAX_SEED
from placeholder.request import Request
from placeholder.tokens.prompt_encoder import encode_prompts, pipeline_inputs, prompt_ids, tokenized
from placeholder.weights.applied import Applied, AppliedWeights

PROMPTS_KEPT = 32  # prompt_embeds, on the device; one takes about a megabyte
LESS_MEMORY = "give a smaller width and height"


class ImageGenerator:
    """The base model in memory, and the weights archives that are applied to it.

    `fast` is the step-distilled LoRA for requests with `go_fast`; without it they use the first-block cache. Layers that do not
    fit into the free memory are offloaded.
    """

    def __init__(self, base: BaseModel, log: Log = print, fast: FastLora | None = None):
        self.base, self.log, self.fast = base, log, fast
        base.fetch(log)
        self.tokenizer = load_tokenizer(base)
        placement = placement_of(base, base.free_bytes())
        log(placement.line)
        self.text_encoder = load_text_encoder(base, offloaded=placement.text_encoder)
        # The pipeline gets prompt_embeds from `_encode`, as in training, so it needs no text encoder of its own.
        self.pipeline = QWEN_IMAGE.pipeline(
            scheduler=load_scheduler(base),
            vae=load_vae(base, base.dtype),
            text_encoder=None,
            tokenizer=None,
            transformer=load_transformer(base, offloaded=placement.transformer),
        )
        self.pipeline.set_progress_bar_config(disable=True)  # its line is rewritten in place, which logs do not show
        # Stretching the schedule so that its last step is at shift_terminal divides 0 by 0 where the last step is the first.
        scheduler = self.pipeline.scheduler
        self.schedulers = (scheduler, type(scheduler).from_config(scheduler.config, shift_terminal=None))
        self.fast_scheduler = type(scheduler).from_config(scheduler.config, **QWEN_IMAGE.distilled_schedule)
        width = self.text_encoder.embed_tokens.embedding_dim
        self.weights = AppliedWeights(self.pipeline.transformer, self.tokenizer, width, base, log)
        self.prompt_embeds = lru_cache(maxsize=PROMPTS_KEPT)(self._encode)

    @readable_errors(LESS_MEMORY)
    @torch.no_grad()
    def generate(self, request: Request, weights: Path | None, extra: Path | None = None) -> Image.Image:
        """Generate the image, with the archive or bare LoRA at `weights`, the one at `extra`, both or neither.

        Raises ValueError when the weights cannot be used, RuntimeError when out of memory. A request that ends early for any
        reason, also an interruption, does not affect the next one.
        """
        fast = self.fast if request.go_fast else None
        self.load(weights, extra, fast, request.extra_placeholder_token)
        self.weights.scale(request.lora_scale, request.extra_lora_scale, fast is not None)
        if request.go_fast:
            self.log(line_of(fast))
        if fast is None:
            return self._render(request, self.schedulers[request.steps == 1], request.go_fast)
        return self._render(fast.adapt(request), self.fast_scheduler)

    def load(
        self, weights: Path | None, extra: Path | None = None, fast: FastLora | None = None, extra_names: tuple[str, ...] = ()
    ) -> None:
        """Apply the archives at these paths and the step-distilled LoRA, and nothing else.

        `extra_names` are what the prompt calls the extra archive's tokens; empty: as they were trained.
        """
        self.weights.apply(weights, extra, fast.lora if fast else None, extra_names)

    def _render(self, request: Request, scheduler: object, first_block_cache: bool = False) -> Image.Image:
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        self.log(f"Seed: {seed}{' (drawn)' if request.seed is None else ''}, size: {request.width}x{request.height}")
        prompts = pipeline_inputs(*self._prompt_embeds(request))
        usable = round((1 - KEPT_FREE) * self.base.free_bytes())
        if line := tile_where_needed(self.pipeline.vae, request.width, request.height, usable):
            self.log(line)
        start = time.monotonic()

        def progress(_pipeline, index: int, _timestep, kept: dict) -> dict:
            self.log(tqdm.format_meter(index + 1, request.steps, time.monotonic() - start, ascii=" #"))
            return kept

        self.pipeline.scheduler = scheduler
        with self._caching(first_block_cache):
            return self.pipeline(
                **prompts,
                true_cfg_scale=request.guidance,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=progress,
            ).images[0]

    def _prompt_embeds(self, request: Request) -> list[Tensor]:
        """Embeddings (1, T, D) of the prompt and, with guidance, of the negative prompt; the gate learns what they name.

        Logs what is left out of them, and which archives' tokens the prompt does not name.
        """
        weights, gate, found, idle = self.weights, self.weights.gate, [], []
        gate.on = request.token_gate
        prompts = {"prompt": request.prompt} | ({"negative prompt": request.negative_prompt} if request.guidance > 1 else {})
        for what, text in prompts.items():
            if len(weights.tokens.ids) == 1:  # as in a caption
                text = with_token(text, *weights.tokens.ids)
            tokens = tokenized(self.tokenizer, weights.tokens, text)
            if tokens.left_out:
                self.log(f"Warning: of the {what} {tokens.cut(weights.tokens)}")
            found.append(self.prompt_embeds(text, weights.applied))
            idle.append(weights.unnamed(weights.tokens.named(tokens.ids)))
            gate.remember(found[-1][0], idle[-1])
        for adapter, names in idle[0].items():
            effect = "the trained subject may not appear"
            if gate.on and adapter in idle[-1]:
                effect = "its LoRA is off: put the token into the prompt, or set token_gate to false"
            elif gate.on:
                effect = "its LoRA acts for the negative prompt alone (token_gate)"
            self.log(f"Warning: the prompt does not name {names}, so {effect}")
        return found

    def _encode(self, prompt: str, _applied: Applied) -> Tensor:
        """Prompt embeddings (1, T, D) with the tokens of the archives that are applied."""
        tokens = self.weights.tokens
        return encode_prompts(self.text_encoder, tokens, torch.tensor([prompt_ids(self.tokenizer, tokens, prompt)]))

    @contextmanager
    def _caching(self, wanted: bool) -> Iterator[None]:
        """The first-block cache on the transformer where it is wanted; one that an interruption left there is removed first."""
        stop_caching(self.pipeline.transformer)
        try:
            if wanted:
                self.pipeline.transformer.enable_cache(FirstBlockCacheConfig())
            yield
        finally:
            stop_caching(self.pipeline.transformer)


@readable_errors(LESS_MEMORY)
def save_image(image: Image.Image, request: Request, folder: Path) -> Path:
    """Write the image in the request's format; `output_quality` counts for webp and jpg, png is lossless."""
    path = folder / f"output.{request.output_format}"
    image.save(path, quality=request.output_quality)
    return path

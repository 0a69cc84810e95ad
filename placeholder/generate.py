"""A whole prediction: the pipeline, the LoRA and token rows of one or two archives on it, and a picture from a request."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from placeholder.errors import readable_errors, shown
from placeholder.lora.adapter import ADAPTER, EXTRA_ADAPTER, FAST_ADAPTER, load_lora, overwrite_lora, scale_loras, unload_lora
from placeholder.lora.distilled import SCHEDULE, FastLora, line_of
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_scheduler, load_text_encoder, load_tokenizer, load_transformer, load_vae
from placeholder.model.offloading import cache_first_block, stop_caching, stop_streaming, stream
from placeholder.model.placement import placement_of
from placeholder.options import MAX_SEED
from placeholder.request import Request
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, archive_tokens, check_tokens
from placeholder.tokens.prompt_encoder import encode_prompts, pipeline_inputs, prompt_ids
from placeholder.transformer.layers import fuse_lora_addition
from placeholder.weights.archive import Weights, content_digest, read_weights

Log = Callable[[str], None]
Applied = tuple[tuple[str, str], ...]  # adapter and the digest of its archive
INCOMPLETE: Applied = (("incomplete", ""),)
ARCHIVES_KEPT = 4  # read and checked, in the host's memory; one of rank 32 takes 0.2 GB
PROMPTS_KEPT = 32  # as embeddings, on the device; one takes about a megabyte
LESS_MEMORY = "give a smaller width and height"
PILLOW_FORMATS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}


class ImageGenerator:
    """The base model in memory, and at most one weights archive applied to it at a time, or one and an extra one.

    `fast` is what a request with `go_fast` is drawn with; without it such a request gets the first-block cache.
    """

    def __init__(self, base: BaseModel, log: Log = print, fast: FastLora | None = None):
        self.log = log
        self.fast = fast
        self.base = base
        base.fetch(log)
        self.tokenizer = load_tokenizer(base)
        placement = placement_of(base)
        log(placement.line)
        self.streamed = placement.stream_transformer
        self.text_encoder = load_text_encoder(base, streamed=placement.stream_text_encoder)
        # The pipeline gets prompt embeddings from `_encode`, the way of training, so it needs no text encoder of its own.
        self.pipeline = QwenImagePipeline(
            scheduler=load_scheduler(base),
            vae=load_vae(base, base.dtype),
            text_encoder=None,
            tokenizer=None,
            transformer=load_transformer(base, streamed=placement.stream_transformer),
        )
        # Stretching the schedule so that its last step is at shift_terminal divides 0 by 0 where the last step is the first.
        scheduler = self.pipeline.scheduler
        self.schedulers = (scheduler, type(scheduler).from_config(scheduler.config, shift_terminal=None))
        self.fast_scheduler = type(scheduler).from_config(scheduler.config, **SCHEDULE)
        self.pipeline.set_progress_bar_config(disable=True)  # its line is rewritten in place, which logs do not show
        self.archives: OrderedDict[str, Weights] = OrderedDict()  # by digest, the least recently used first
        self.embeddings = lru_cache(maxsize=PROMPTS_KEPT)(self._encode)
        self.caching = False
        self._plain()

    @readable_errors(LESS_MEMORY)
    @torch.no_grad()
    def generate(self, request: Request, weights: Path | None, extra: Path | None = None) -> Image.Image:
        """Draw the picture, with the archive or bare LoRA at `weights`, the one at `extra`, both or neither on the base model.

        Raises ValueError when the weights cannot be used and RuntimeError when the memory does not suffice. Whatever ends a
        request early, also an interruption, leaves nothing that the next one would show.
        """
        fast = self.fast if request.go_fast else None
        self.load(weights, extra, fast)
        scales = {ADAPTER: request.lora_scale, EXTRA_ADAPTER: request.extra_lora_scale}
        active = {adapter: scales[adapter] for adapter, _ in self.applied} | ({FAST_ADAPTER: 1.0} if fast else {})
        if active:
            scale_loras(self.pipeline.transformer, active)
        for subject in self.subjects:
            if subject and not any(token in request.prompt for token in subject):
                named = " or ".join(subject)
                self.log(f"Warning: the prompt does not name {named}, so the trained subject may not appear")
        return self._render(request, fast)

    def load(self, path: Path | None, extra: Path | None = None, fast: FastLora | None = None) -> None:
        """Apply an archive, and an extra one, unless those applied have the same content; nothing of earlier ones remains.

        The step-distilled LoRA is put beside them. It stays, passed over, until no archive is asked for or other layers.
        """
        paths = {adapter: given for adapter, given in ((ADAPTER, path), (EXTRA_ADAPTER, extra)) if given}
        if not paths and not fast:
            self.unload()
            return
        wanted = tuple((adapter, content_digest(given)) for adapter, given in paths.items())
        if wanted != self.applied:
            self._apply(paths, wanted)
        if fast and not self.fast_on:
            self.applied = INCOMPLETE
            self._put_on(fast.lora, FAST_ADAPTER)
            self.fast_on = True
            self.applied = wanted

    def _apply(self, paths: dict[str, Path], wanted: Applied) -> None:
        parts = [self._read(paths[adapter], digest) for adapter, digest in wanted]
        tokens = self._tokens(*parts)
        if not self._overwrite(wanted, parts):
            self.unload()
            self.applied = INCOMPLETE  # so that an interruption here is undone by the next request
            for adapter, part in zip(paths, parts, strict=True):
                self._put_on(part.lora, adapter)
        self.tokens, self.subjects = tokens, [tuple(part.embeddings) for part in parts]
        self.applied = wanted
        for token, ids in tokens.ids.items():
            self.log(f"Placeholder token '{token}' registered with ID: {', '.join(map(str, ids))}")
        for adapter, part in zip(paths, parts, strict=True):
            name = "Weights" if adapter == ADAPTER else "Extra weights"
            self.log(f"{name} applied: {len(part.lora)} LoRA tensors, {len(part.embeddings)} embeddings")

    def _put_on(self, lora: dict[str, Tensor], adapter: str) -> None:
        load_lora(self.pipeline.transformer, lora, adapter)
        if not self.streamed:  # streaming brings weights to the device where their layers are called
            fuse_lora_addition(self.pipeline.transformer, adapter)

    def _overwrite(self, wanted: Applied, parts: list[Weights]) -> bool:
        """Put the one LoRA that is wanted into the layers of the one that is applied, where these are the same."""
        if self.streamed or [adapter for adapter, _ in self.applied] != [adapter for adapter, _ in wanted] or len(parts) > 1:
            return False
        before, self.applied = self.applied, INCOMPLETE  # so that an interruption here is undone by the next request
        if overwrite_lora(self.pipeline.transformer, parts[0].lora):
            return True
        self.applied = before
        return False

    def _read(self, path: Path, digest: str) -> Weights:
        """The archive, from memory where one of the same content was read lately."""
        weights = self.archives.pop(digest, None) or read_weights(path)
        self.archives[digest] = weights
        while len(self.archives) > ARCHIVES_KEPT:
            self.archives.popitem(last=False)
        return weights

    def unload(self) -> None:
        """Back to the base model alone, bit for bit."""
        if not self.applied and not self.fast_on:
            return
        transformer, restream = self.pipeline.transformer, self.streamed and self.applied == INCOMPLETE
        self.applied = INCOMPLETE
        if restream:  # the streaming of the layers may be half taken off or put on
            stop_streaming(transformer)
        unload_lora(transformer)
        if restream:
            stream(transformer, self.base.device)
        self._plain()

    def _plain(self) -> None:
        self.tokens, self.subjects, self.fast_on = self._tokens(), [], False
        self.applied: Applied = ()  # last, so that an interruption here is undone by the next request

    def _tokens(self, *parts: Weights) -> PlaceholderTokens:
        """The archives' tokens, registered behind this tokenizer's last id: the first's where they were in training, then the extra's.

        An archive's recorded ids are those it has alone, where they prove that it was trained on this vocabulary.
        """
        width = self.text_encoder.embed_tokens.embedding_dim
        embeddings: dict[str, Tensor] = {}
        for part in parts:
            archive_tokens(part.embeddings, part.meta.get("placeholder_token_ids", {}), self.tokenizer, width)
            if shared := sorted(embeddings.keys() & part.embeddings.keys()):
                raise ValueError(
                    f"replicate_weights and extra_lora_weights both use the token {shared[0]!r}: train one of them with another"
                )
            for name, here in (("base_model", self.base.source), ("base_model_revision", self.base.commit)):
                if (trained_on := part.meta.get(name, here)) != here:
                    self.log(f"Warning: trained on {name} {shown(trained_on)}, applied to {here}")
            embeddings |= part.embeddings
        check_tokens(tuple(embeddings), self.tokenizer)  # those of one archive may overlap with those of the other
        return PlaceholderTokens(len(self.tokenizer), embeddings, width).to(self.base.device)

    def _encode(self, prompt: str, applied: Applied) -> Tensor:
        """Prompt embeddings (1, T, D) with the tokens of the archives `applied`."""
        input_ids = torch.tensor([prompt_ids(self.tokenizer, self.tokens, prompt)], device=self.base.device)
        return encode_prompts(self.text_encoder, self.tokens, input_ids)

    def _render(self, request: Request, fast: FastLora | None) -> Image.Image:
        if request.go_fast:
            self.log(line_of(fast))
        request = fast.ask(request) if fast else request
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        self.log(f"Seed: {seed}{' (drawn)' if request.seed is None else ''}, size: {request.width}x{request.height}")
        negative = self.embeddings(request.negative_prompt, self.applied) if request.guidance > 1 else None
        prompts = pipeline_inputs(self.embeddings(request.prompt, self.applied), negative)
        start = time.monotonic()

        def progress(_pipeline, index: int, _timestep, kept: dict) -> dict:
            self.log(tqdm.format_meter(index + 1, request.steps, time.monotonic() - start, ascii=" #"))
            return kept

        self.pipeline.scheduler = self.fast_scheduler if fast else self.schedulers[request.steps == 1]
        self._stop_caching()
        try:
            if request.go_fast and not fast:
                self.caching = True
                cache_first_block(self.pipeline.transformer)
            return self.pipeline(
                **prompts,
                true_cfg_scale=request.guidance,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=progress,
            ).images[0]
        finally:
            self._stop_caching()

    def _stop_caching(self) -> None:
        """Take the first-block cache off the transformer, also where putting it on or off was interrupted half way."""
        if self.caching:
            stop_caching(self.pipeline.transformer)
            self.caching = False


@readable_errors(LESS_MEMORY)
def save_image(image: Image.Image, request: Request, folder: Path) -> Path:
    """Write the picture in the request's format; `output_quality` counts for webp and jpg, png is lossless."""
    path = folder / f"output.{request.output_format}"
    options = {} if request.output_format == "png" else {"quality": request.output_quality}
    image.save(path, PILLOW_FORMATS[request.output_format], **options)
    return path

"""From a data set and a configuration to everything a training needs: examples, models in their places, optimizers."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.captions import (
    Prompts,
    check_autocaption,
    describe_photos,
    draft,
    draft_length,
    prompts_of,
    trained_captions,
    undescribed,
)
from placeholder.data.dataset import Photo, dataset_digest, read_dataset, thumbnail
from placeholder.devices import free_bytes, free_memory
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.lora.adapter import add_lora
from placeholder.model.base import BaseModel
from placeholder.model.captioner import check_vision_tower, load_vlm
from placeholder.model.loading import (
    language_model,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    shift_constants,
    text_width,
)
from placeholder.model.vae import PIXELS_A_TOKEN, encode_image
from placeholder.report.samples import grid_prompts
from placeholder.tokens.placeholder_tokens import check_tokens, fresh_tokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, PromptEmbeddings, prompt_ids
from placeholder.training.checkpoint import Checkpoint
from placeholder.training.examples import Example
from placeholder.training.flow import shift_mu
from placeholder.training.loop import TrainState
from placeholder.training.memory_plan import Plan, plan_training
from placeholder.training.noise_levels import levels_in_use
from placeholder.training.optimizers import STATES, RowOptimizer, lora_optimizer, row_rms_limit
from placeholder.training.resume import (
    apply_start,
    check_dataset,
    check_storage,
    start_position,
    stored_descriptions,
    stored_table,
)
from placeholder.training.timing import Timing
from placeholder.training.training import Training
from placeholder.transformer.payback import payback_of
from placeholder.weights.archive import Weights

Log = Callable[[str], None]
THUMBNAILS, THUMBNAIL_SIDE = 64, 128  # how many of the data set's pictures the report shows, and their pixels


def prepare(
    dataset: Path,
    config: TrainConfig,
    base: BaseModel,
    log: Log,
    processes: Processes = SINGLE_PROCESS,
    start: Checkpoint | Weights | None = None,
    timing: Timing | None = None,
) -> Training:
    """Read the data set, encode what cannot change, and put the models in their places; `config.seed` is not None.

    With a `start` the training goes on from there. Raises ValueError for a bad data set or token, and for a training that does
    not fit into memory, before any weight is loaded.
    """
    timing = timing or Timing()
    with timing.part("load"):
        tokenizer = load_tokenizer(base)
    for warning in check_tokens(config.tokens, tokenizer):
        log(f"Warning: {warning}")
    with timing.part("data set"):
        photos, report = read_dataset(dataset, config.resolution)
    for line in report.lines("to be described by autocaption") if config.autocaption else report.lines():
        log(line)
    waiting = undescribed(photos, config)
    if waiting:
        check_autocaption(config)
        check_vision_tower(base)
    descriptions = stored_descriptions(start, len(waiting))
    drafted = bool(waiting) and descriptions is None  # until the models are loaded, the longest that may come stand in
    say = _silent if drafted else log
    captions = trained_captions(photos, config, say, descriptions or [draft(config)] * len(waiting))
    digest = dataset_digest(photos, [caption.text for caption in captions])
    processes.check_same("a data set", digest)
    if not drafted:
        check_dataset(start, digest)

    generator = torch.Generator().manual_seed(config.seed)
    tokens = fresh_tokens(config, text_width(base), tokenizer, generator, log).to(base.device)
    empty_ids = prompt_ids(tokenizer, tokens, EMPTY_PROMPT)
    prompts = prompts_of(captions, config, tokenizer, tokens, say)
    longest = max(prompts.longest, draft_length(config, tokenizer, tokens) if waiting else 0)
    largest = max((_grid(pixels) for photo in photos for pixels in photo.crops), key=math.prod)
    free = processes.all_reduce_min(free_bytes(base.device))
    plan = plan_training(base, replace(config, autocaption=drafted), largest, longest, free, processes.world_size)
    plan = plan.as_before(stored_table(start))
    check_storage(start, plan.chosen.quantization)
    for line in plan.lines():
        log(line)

    with timing.part("load"):
        base.fetch(log)
    with timing.part("cache"):
        latents = _latents(photos, base, log)
    if drafted:
        text_encoder, descriptions = _captioning_text_encoder(base, config, tokenizer, waiting, processes, timing, log)
        captions = trained_captions(photos, config, log, descriptions)
        digest = dataset_digest(photos, [caption.text for caption in captions])
        prompts = prompts_of(captions, config, tokenizer, tokens, log)
    else:
        with timing.part("load"):
            text_encoder = load_text_encoder(base, "int8" if config.quantize_te else "none")
    drawn = {text: prompt_ids(tokenizer, tokens, text) for text in grid_prompts(config, [caption.text for caption in captions])}
    prompt_embeds = PromptEmbeddings(text_encoder, tokens)
    with timing.part("cache"):
        kept = chain.from_iterable(prompts.preserved)
        cached = prompt_embeds.cache([empty_ids, *prompts.ids, *kept, *drawn.values()])
    log(f"Text embeddings: {cached} prompts cached")
    row_optimizer = None
    if config.tokens:
        limit = row_rms_limit(text_encoder.embed_tokens.weight, len(tokenizer))
        row_optimizer = RowOptimizer(tokens.rows, config.placeholder_learning_rate, limit)
    else:
        prompt_embeds.release()
    del text_encoder
    free_memory()  # the VAE too

    examples, position = _examples(latents, prompts, photos, base), start_position(start, generator)
    with timing.part("load"):
        levels = levels_in_use(base, config, examples, empty_ids, position, processes) if plan.chosen.tabled else None
        train_state = _trainee(config, plan, base, levels, prompt_embeds, row_optimizer, log)
    initial_rows = tokens.rows.detach().clone()
    if start is not None:
        log(apply_start(start, train_state, tokens, position))
    return Training(
        train_state,
        examples,
        empty_ids,
        position,
        tokenizer,
        tokens,
        initial_rows,
        prompt_embeds,
        report,
        digest,
        plan,
        payback_of(config, examples, empty_ids, train_state.transformer, log),
        captions=captions,
        descriptions=descriptions or [],
        thumbnails=[thumbnail(photo, THUMBNAIL_SIDE) for photo in photos[:THUMBNAILS] if config.report],
        prompts=drawn,
    )


def _silent(_line: str) -> None:
    """A log that nobody reads."""


def _captioning_text_encoder(
    base: BaseModel,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    photos: list[Photo],
    processes: Processes,
    timing: Timing,
    log: Log,
) -> tuple[nn.Module, list[str]]:
    """The text encoder as `load_text_encoder` has it, and descriptions of the pictures by the whole of which it is a part."""
    with timing.part("load"):
        whole = load_vlm(base)
    with timing.part("captions"):
        descriptions = describe_photos(whole, tokenizer, photos, config, processes, log)
    return language_model(whole, base, "int8" if config.quantize_te else "none"), descriptions


def _grid(pixels: Tensor) -> tuple[int, int]:
    """Height and width in image tokens of a crop (3, H, W)."""
    return pixels.shape[1] // PIXELS_A_TOKEN, pixels.shape[2] // PIXELS_A_TOKEN


def _latents(photos: list[Photo], base: BaseModel, log: Log) -> list[list[tuple[Tensor, tuple[int, int]]]]:
    """For each picture its crops as packed latents, in the host's memory, with their height and width in tokens."""
    vae = load_vae(base, torch.float32)
    latents = [[(encode_image(vae, pixels).cpu(), _grid(pixels)) for pixels in photo.crops] for photo in photos]
    log(f"Latents: {sum(map(len, latents))} crops cached")
    return latents


def _examples(latents: list, prompts: Prompts, photos: list[Photo], base: BaseModel) -> list[Example]:
    shift = shift_constants(base)
    return [
        Example(packed, grid, shift_mu(len(packed), *shift), caption_ids, preserved_ids, weights)
        for crops, caption_ids, preserved_ids, photo in zip(latents, prompts.ids, prompts.preserved, photos, strict=True)
        for (packed, grid), weights in zip(crops, photo.weights or [None] * len(crops), strict=True)
    ]


def _trainee(
    config: TrainConfig,
    plan: Plan,
    base: BaseModel,
    levels: Tensor | None,
    prompt_embeds: PromptEmbeddings,
    row_optimizer: RowOptimizer | None,
    log: Log,
) -> TrainState:
    transformer = load_transformer(base, plan.chosen.quantization, levels)
    if levels is not None:
        table = transformer.time_text_embed.rows
        log(f"Modulations: a table of {len(table)} noise levels, {table.nbytes / 1e9:.3g} GB in the host's memory")
    lora = add_lora(transformer, config.rank, config.seed)
    log(f"LoRA: rank {config.rank}, {sum(p.numel() for p in lora)} parameters in {len(lora) // 2} layers")
    if config.optimizer == "prodigy":
        log("Prodigy finds the LoRA's step size itself: learning_rate is not used")
    optimizer = lora_optimizer(config.optimizer, lora, config.learning_rate)
    checkpointing = plan.checkpointing(transformer, lora, STATES[config.optimizer], free_bytes(transformer.device), log)
    return TrainState(transformer, prompt_embeds, lora, optimizer, checkpointing, row_optimizer)

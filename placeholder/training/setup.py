"""From a data set to a training that is ready for its first step: read the data, plan the memory, build the models."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.autocaption import check_autocaption, describe_photos, draft, undescribed
from placeholder.data.captions import trained_captions
from placeholder.data.dataset import DatasetReport, Photo, dataset_digest, read_dataset, thumbnail
from placeholder.devices import free_memory
from placeholder.errors import Log, quoted
from placeholder.lora.adapter import add_lora
from placeholder.model.base import QWEN_IMAGE
from placeholder.model.captioner import check_vision_tower, load_vlm
from placeholder.model.loading import load_text_encoder, load_tokenizer, load_transformer, load_vae, shift_constants, text_width
from placeholder.model.vae import encode_image
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, fresh_tokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, PromptEncoder, prompt_ids, tokenized
from placeholder.tokens.vocabulary import check_tokens
from placeholder.training.context import Context, Training, TrainingData
from placeholder.training.examples import BatchSampler, Example, Prompts, prompts_of
from placeholder.training.flow import sigma_grid
from placeholder.training.loop import TrainState
from placeholder.training.losses import Denoiser
from placeholder.training.memory_plan import Plan, plan_memory
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer, token_rms_limit
from placeholder.training.resume import apply_start, check_dataset, stored_descriptions, stored_need
from placeholder.transformer.graphs import Passes

THUMBNAILS, THUMBNAIL_SIDE = 64, 128  # how many of the data set's images the report shows, and their pixels


def prepare(
    dataset: Path,
    context: Context,
    shown_prompts: Callable[[TrainConfig, list[str]], list[str]] = lambda config, captions: [],
) -> Training:
    """All stages from the archive of images on. `shown_prompts` gives the prompts of the report's images.

    Raises ValueError for bad data, a bad token, and a training that does not fit into memory, before any weight is loaded.
    """
    config, base, log, timing = context.config, context.base, context.log, context.timing
    with timing.part("load"):
        tokenizer = load_tokenizer(base)
    for warning in check_tokens(config.tokens, tokenizer):
        log(f"Warning: {warning}")
    photos, report, descriptions = read_photos(dataset, context)
    generator = torch.Generator().manual_seed(config.seed)
    tokens = fresh_tokens(config, text_width(base), tokenizer, generator, log).to(base.device)
    plan = plan_photos(photos, descriptions, tokenizer, tokens, context)
    with timing.part("load"):
        base.fetch(log)
    if descriptions is None:
        descriptions = write_captions(photos, tokenizer, context)
    captions = trained_captions(photos, config, log, descriptions)
    texts = [caption.text for caption in captions]
    digest = dataset_digest(photos, texts)
    prompts = prompts_of(captions, config, tokenizer, tokens, log)
    shown = {
        text: sample_ids(text, tokenizer, tokens, _silent if text in texts else log) for text in shown_prompts(config, texts)
    }
    thumbnails = [thumbnail(photo, THUMBNAIL_SIDE) for photo in photos[:THUMBNAILS] if config.report]
    data = TrainingData(report, captions, descriptions, digest, thumbnails)
    empty_ids = prompt_ids(tokenizer, tokens, EMPTY_PROMPT)
    examples = encode_photos(photos, prompts, context)
    texts = [empty_ids, *prompts.all, *shown.values()]
    prompt_embeds, token_optimizer = encode_text(texts, tokenizer, tokens, context, plan.chosen.offloaded)
    sampler = BatchSampler(
        examples, empty_ids, config.batch_size * context.processes.world_size, config.caption_dropout, generator
    )
    with timing.part("load"):
        state = build(plan, prompt_embeds, token_optimizer, sampler, context)
    initial_rows = tokens.rows.detach().clone()
    if context.start is not None:
        log(apply_start(context.start, state, tokens))
    return Training(data, plan, state, tokenizer, tokens, initial_rows, prompt_embeds, shown)


def read_photos(dataset: Path, context: Context) -> tuple[list[Photo], DatasetReport, list[str] | None]:
    """The images with their captions, and what autocaption wrote for those without; None where it has still to write it."""
    config = context.config
    with context.timing.part("data set"):
        photos, report = read_dataset(dataset, config.resolution)
    for line in report.lines("to be captioned by autocaption") if config.autocaption else report.lines():
        context.log(line)
    missing = undescribed(photos, config)
    if not missing:
        return photos, report, []
    check_autocaption(config)
    check_vision_tower(context.base)
    return photos, report, stored_descriptions(context.start, len(missing))


def plan_photos(
    photos: list[Photo],
    descriptions: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens: PlaceholderTokens,
    context: Context,
) -> Plan:
    """The memory plan for the largest crop and the longest prompt; captions still to be written count at their longest.

    Checks first that all processes, and the training that is resumed, have this data set.
    """
    config = context.config
    drafts = [draft(config)] * len(undescribed(photos, config)) if descriptions is None else descriptions
    captions = trained_captions(photos, config, _silent, drafts)
    digest = dataset_digest(photos, [caption.text for caption in captions])
    context.processes.check_same("the data set", digest)
    check_dataset(context.start, digest)
    longest = max(map(len, prompts_of(captions, config, tokenizer, tokens, _silent).all))
    largest = max((_grid(pixels) for photo in photos for pixels in photo.crops), key=math.prod)
    free = min(context.processes.all_gather([context.base.free_bytes()]))
    config = replace(config, autocaption=descriptions is None)
    plan = plan_memory(context.base, config, largest, longest, free, stored_need(context.start))
    for line in plan.lines():
        context.log(line)
    return plan


def _silent(_line: str) -> None:
    """Nothing of a draft is worth a line."""


def write_captions(photos: list[Photo], tokenizer: PreTrainedTokenizerBase, context: Context) -> list[str]:
    """What autocaption writes for the images without a caption, by the whole of Qwen2.5-VL, which is loaded for it alone."""
    with context.timing.part("load"):
        vlm = load_vlm(context.base)
    with context.timing.part("captions"):
        missing = undescribed(photos, context.config)
        found = describe_photos(vlm, tokenizer, missing, context.config, context.processes, context.log)
    del vlm
    free_memory()
    return found


def encode_photos(photos: list[Photo], prompts: Prompts, context: Context) -> list[Example]:
    """An example for each crop, with its latents in the host's memory; the VAE is loaded for it alone."""
    shift = shift_constants(context.base)
    with context.timing.part("cache"):
        vae = load_vae(context.base, torch.float32)
        examples = []
        for photo, input_ids, preserved in zip(photos, prompts.ids, prompts.preserved, strict=True):
            for pixels, weights in zip(photo.crops, photo.weights or [None] * len(photo.crops), strict=True):
                latents = encode_image(vae, pixels).cpu()  # (L, C)
                mu = calculate_shift(len(latents), *shift)
                examples.append(Example(latents, _grid(pixels), mu, input_ids, preserved, weights))
    context.log(f"Latents: {len(examples)} crops cached")
    return examples


def sample_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, log: Log) -> tuple[int, ...]:
    """The ids of a prompt of the report's images; logs what is left out of it."""
    found = tokenized(tokenizer, tokens, prompt)
    if found.left_out:
        log(f"Warning: of the sample prompt {quoted(prompt)} {found.cut(tokens)}")
    return found.ids


def encode_text(
    prompts: list[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    tokens: PlaceholderTokens,
    context: Context,
    offloaded: int,
) -> tuple[PromptEncoder, TokenOptimizer | None]:
    """Embeddings of prompts, cached without a placeholder; the text encoder, partly `offloaded`, is kept to train tokens."""
    config, token_optimizer = context.config, None
    with context.timing.part("load"):
        text_encoder = load_text_encoder(context.base, "int8" if config.quantize_te else "none", offloaded)
    prompt_embeds = PromptEncoder(text_encoder, tokens)
    with context.timing.part("cache"):
        cached = prompt_embeds.cache(prompts)
    context.log(f"Text embeddings: {cached} prompts cached")
    if config.tokens:
        limit = token_rms_limit(text_encoder.embed_tokens.weight, len(tokenizer))
        token_optimizer = TokenOptimizer(tokens.rows, config.placeholder_learning_rate, limit)
    else:
        prompt_embeds.release()
    del text_encoder
    free_memory()  # a GPU's: of the VAE too
    return prompt_embeds, token_optimizer


def build(
    plan: Plan,
    prompt_embeds: PromptEncoder,
    token_optimizer: TokenOptimizer | None,
    sampler: BatchSampler,
    context: Context,
) -> TrainState:
    """The transformer as planned, with a fresh LoRA, its optimizer, and the checkpointed blocks that the memory demands."""
    config, base, log = context.config, context.base, context.log
    transformer = load_transformer(base, plan.chosen.quantization, sigma_grid() if plan.chosen.tabled else None)
    if plan.chosen.tabled:
        table = transformer.time_text_embed.rows
        log(f"Modulations: a table of {len(table)} sigmas, {table.nbytes / 1e9:.3g} GB in the host's memory")
    lora = add_lora(transformer, config.rank, config.seed)
    log(f"LoRA: rank {config.rank}, {sum(p.numel() for p in lora)} parameters in {len(lora) // 2} layers")
    if config.optimizer == "prodigy":
        log("Prodigy finds the LoRA's step size itself: learning_rate is not used")
    optimizer = lora_optimizer(config.optimizer, lora, config.learning_rate)
    checkpointing = plan.checkpointing(transformer, lora, config.optimizer, base.free_bytes())
    log(f"Memory: {checkpointing.checkpointed} of {checkpointing.blocks} blocks are checkpointed")
    passes = Passes(base.device, transformer, log, config.steps)
    return TrainState(Denoiser(transformer), prompt_embeds, lora, optimizer, sampler, checkpointing, passes, token_optimizer)


def _grid(pixels: Tensor) -> tuple[int, int]:
    """Height and width in image tokens of a crop (3, H, W)."""
    return pixels.shape[1] // QWEN_IMAGE.pixels_per_token, pixels.shape[2] // QWEN_IMAGE.pixels_per_token

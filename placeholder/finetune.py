"""A whole training: data set and configuration in, a proven weights archive out."""

import gc
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from placeholder.checks import MAX_SEED
from placeholder.config import TrainConfig
from placeholder.dataset import DatasetReport, Photo, read_dataset
from placeholder.flow import shift_mu
from placeholder.lora import add_lora, load_lora, lora_metadata, lora_state_dict, unload_lora
from placeholder.models import (
    EMPTY_PROMPT,
    BaseModel,
    PromptEmbeddings,
    encode_picture,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    prompt_ids,
)
from placeholder.optimizers import RowOptimizer, lora_optimizer, row_rms_limit
from placeholder.placeholder_token import PlaceholderTokens, check_tokens, initial_embeddings, place_token
from placeholder.trainer import Example, predict_velocity, training_steps
from placeholder.weights import Weights, read_weights, write_weights

Log = Callable[[str], None]
VAE_FACTOR, PATCH = 8, 2  # pixels a latent, latents a token, along one side


def finetune(dataset: Path, config: TrainConfig, output: Path, base: BaseModel, log: Log = print) -> dict[str, Any]:
    """Train on the data-set archive and write the weights archive to `output`; returns what meta.json holds.

    Raises ValueError for a bad data set or token before any weight is loaded, and RuntimeError when the loss stops being
    finite or the archive does not prove itself.
    """
    config = _with_seed(config, log)
    if config.placeholder_token and not config.tokens:
        log(f"Placeholder token '{','.join(config.placeholder_token)}' is not used: train_placeholder_token is false")
    tokenizer = load_tokenizer(base)
    for warning in check_tokens(config.tokens, tokenizer):
        log(f"Warning: {warning}")
    photos, report = read_dataset(dataset, config.resolution)
    for line in report.lines():
        log(line)
    captions = _captions(photos, config, log)

    generator = torch.Generator().manual_seed(config.seed)
    latents = _latents(photos, base, log)
    tokens, prompt_embeds = _prompt_embeds(config, base, tokenizer, generator, log)
    ids = [prompt_ids(tokenizer, tokens, caption) for caption in captions]
    _log_prompt_ids(config, captions, tokens, tokenizer, log)
    empty_ids = prompt_ids(tokenizer, tokens, EMPTY_PROMPT)
    log(f"Text embeddings: {prompt_embeds.cache([empty_ids, *ids])} prompts cached")
    rms_limit = row_rms_limit(prompt_embeds.text_encoder.embed_tokens.weight, len(tokenizer)) if tokens.ids else 0.0
    if not tokens.ids:
        prompt_embeds.release()
        _free_memory()

    scheduler = load_scheduler(base)
    examples = [
        Example(packed, grid, _mu(scheduler, len(packed)), caption_ids)
        for crops, caption_ids in zip(latents, ids, strict=True)
        for packed, grid in crops
    ]
    transformer = load_transformer(base, config.quantize)
    lora = add_lora(transformer, config.rank, config.seed)
    transformer.enable_gradient_checkpointing()
    log(
        f"LoRA: rank {config.rank}, {sum(p.numel() for p in lora)} parameters in {len(lora) // 2} layers, {len(examples)} crops to train on"
    )
    if config.optimizer == "prodigy":
        log("Prodigy finds the LoRA's step size itself: learning_rate is not used")

    steps = training_steps(
        transformer,
        prompt_embeds,
        examples,
        empty_ids,
        lora,
        lora_optimizer(config.optimizer, lora, config.learning_rate),
        RowOptimizer(tokens.rows, config.placeholder_learning_rate, rms_limit) if tokens.ids else None,
        config.steps,
        config.batch_size,
        config.caption_dropout,
        generator,
    )
    figures = _run(steps, config.steps, tokens, log)
    meta = _meta(config, base, tokens, report, figures)
    weights = Weights(lora_state_dict(transformer), tokens.embeddings(), meta)
    write_weights(output, weights, lora_metadata(transformer))
    prove_archive(output, weights, transformer, prompt_embeds, examples[0])
    log(
        f"Weights archive proved: {len(weights.lora)} LoRA tensors, {len(weights.embeddings)} embeddings, {output.stat().st_size} bytes"
    )
    return meta


def _with_seed(config: TrainConfig, log: Log) -> TrainConfig:
    """The configuration with the seed that the run really uses."""
    drawn = config.seed is None
    config = replace(config, seed=secrets.randbelow(MAX_SEED + 1)) if drawn else config
    log(f"Seed: {config.seed}{' (drawn)' if drawn else ''}")
    return config


def _captions(photos: list[Photo], config: TrainConfig, log: Log) -> list[str]:
    """One caption a picture: its own or the default one, with the token in its place."""
    captions = [photo.caption or config.default_caption for photo in photos]
    if not config.tokens:
        return captions
    placed = [place_token(caption, config.tokens, photo.name) for caption, photo in zip(captions, photos, strict=True)]
    log(f"Captions: {sum(in_front for _, in_front in placed)} of {len(placed)} lacked the token and got it in front")
    return [caption for caption, _ in placed]


def _latents(photos: list[Photo], base: BaseModel, log: Log) -> list[list[tuple[Tensor, tuple[int, int]]]]:
    """For each picture its crops as packed latents with their height and width in tokens; the VAE is freed afterwards."""
    vae = load_vae(base, torch.float32)
    side = VAE_FACTOR * PATCH
    latents = [
        [(encode_picture(vae, pixels), (pixels.shape[1] // side, pixels.shape[2] // side)) for pixels in photo.crops]
        for photo in photos
    ]
    log(f"Latents: {sum(map(len, latents))} crops cached")
    del vae
    _free_memory()
    return latents


def _prompt_embeds(config: TrainConfig, base: BaseModel, tokenizer, generator: torch.Generator, log: Log):
    """The text encoder behind its cache, and the placeholder tokens with their fresh rows."""
    text_encoder = load_text_encoder(base, config.quantize_te)
    width = text_encoder.embed_tokens.embedding_dim
    embeddings = initial_embeddings(config.tokens, width, config.placeholder_init_std, generator)
    tokens = PlaceholderTokens(len(tokenizer), embeddings, width).to(base.device)
    for token, ids in tokens.ids.items():
        log(f"Placeholder token '{token}' registered with ID: {', '.join(map(str, ids))}")
    if tokens.ids:
        ids = [str(token_id) for token_ids in tokens.ids.values() for token_id in token_ids]
        only = f"token {ids[0]} receives" if len(ids) == 1 else f"tokens {', '.join(ids)} receive"
        log(f"Gradient mask active: only {only} updates")
    return tokens, PromptEmbeddings(text_encoder, tokens)


def _log_prompt_ids(config: TrainConfig, captions: list[str], tokens: PlaceholderTokens, tokenizer, log: Log) -> None:
    if config.log_prompt_ids:
        for caption in dict.fromkeys(captions):
            log(f"Prompt '{caption}' tokenized to: {tokens.tokenize(tokenizer, caption)}")


def _mu(scheduler, image_tokens: int) -> float:
    config = scheduler.config
    return shift_mu(image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)


def _run(steps, total: int, tokens: PlaceholderTokens, log: Log) -> dict[str, Any]:
    """Go through the steps with about a hundred progress lines; returns the last mean loss and the rows' norms."""
    interval = max(1, total // 100)
    start, losses, mean_loss = time.monotonic(), [], 0.0
    for step in steps:
        losses.append(step.loss)
        if step.number != 1 and step.number % interval and step.number != total:
            continue
        mean_loss = torch.stack(losses).mean().item()
        losses = []
        if not abs(mean_loss) < float("inf"):  # also false for NaN
            raise RuntimeError(
                f"the loss became {mean_loss} by step {step.number}: train again with a lower learning_rate or "
                "placeholder_learning_rate"
            )
        figures = f"loss={mean_loss:.4f}"
        if tokens.ids:
            figures += f", row norm={tokens.rows.detach().norm(dim=1).mean().item():.3g}"
        log(tqdm.format_meter(step.number, total, time.monotonic() - start, ascii=" #", postfix=figures))
    norms = {token: rows.norm(dim=1).tolist() for token, rows in tokens.embeddings().items()}
    return {"loss": mean_loss, "placeholder_row_norms": norms, "training_seconds": round(time.monotonic() - start, 3)}


def _meta(
    config: TrainConfig, base: BaseModel, tokens: PlaceholderTokens, report: DatasetReport, figures: dict[str, Any]
) -> dict[str, Any]:
    """meta.json: the resolved configuration, what was found and learned, and the versions that made it."""
    ids = next(iter(tokens.ids.values()), None)
    return {
        "base_model": base.source,
        "training_mode": config.training_mode,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **asdict(config),
        "resolution": ",".join(map(str, config.resolution)),
        "placeholder_token": ",".join(config.tokens) or None,
        "placeholder_token_id": ids[0] if ids else None,
        "placeholder_token_ids": tokens.ids,
        "lora_alpha": config.rank,
        "images": report.images,
        "captions_found": report.captions_found,
        "buckets": report.buckets,
        **figures,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
    }


@torch.no_grad()
def prove_archive(
    path: Path, trained: Weights, transformer: QwenImageTransformer2DModel, prompt_embeds: PromptEmbeddings, example: Example
) -> None:
    """Open the archive again and hold it against what was trained; takes the LoRA off the transformer.

    Raises RuntimeError unless the rows and the LoRA come back bit for bit, every LoRA key is applied to the transformer, and
    the transformer's output changes by it.
    """
    stored = read_weights(path)
    if stored.embeddings.keys() != trained.embeddings.keys() or any(
        not torch.equal(rows, stored.embeddings[token]) for token, rows in trained.embeddings.items()
    ):
        raise RuntimeError("the archive does not hold the embedding that was trained")
    if stored.lora.keys() != trained.lora.keys() or any(
        not torch.equal(value, stored.lora[key]) for key, value in trained.lora.items()
    ):
        raise RuntimeError("the archive does not hold the LoRA that was trained")

    def velocity() -> Tensor:
        sigmas = torch.full((1,), 0.5, device=transformer.device)
        embeds = prompt_embeds([example.input_ids])
        return predict_velocity(transformer, example.latents[None].to(transformer.device), sigmas, embeds, example.grid)

    unload_lora(transformer)
    without = velocity()
    load_lora(transformer, stored.lora)
    with_lora = velocity()
    unload_lora(transformer)
    if not torch.isfinite(with_lora).all() or torch.equal(without, with_lora):
        raise RuntimeError(
            "the stored LoRA does not change what the transformer predicts: train for more steps or at a higher rate"
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

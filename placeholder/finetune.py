"""A whole training: data set and configuration in, a proven weights archive out."""

import math
import secrets
import time
from collections.abc import Iterator
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
from placeholder.diagnostics import diagnose
from placeholder.lora import load_lora, lora_metadata, lora_state_dict, unload_lora
from placeholder.memory import peak_bytes, reset_peak
from placeholder.models import BaseModel, PromptEmbeddings
from placeholder.placeholder_token import PlaceholderTokens
from placeholder.prepare import Log, Training, prepare
from placeholder.processes import Processes
from placeholder.trainer import ALONE, Example, Step, predict_velocity
from placeholder.weights import Weights, read_weights, write_weights


def finetune(
    dataset: Path, config: TrainConfig, output: Path, base: BaseModel, log: Log = print, processes: Processes = ALONE
) -> dict[str, Any] | None:
    """Train on the data-set archive and write the weights archive to `output`; returns what meta.json holds.

    Of several processes the first alone writes and returns that, the others None.
    Raises ValueError for a bad data set or token before any weight is loaded, and RuntimeError when the loss stops being
    finite or the archive does not prove itself.
    """
    config = processes.agree(with_seed(config, log))
    if config.placeholder_token and not config.tokens:
        log(f"Placeholder token '{','.join(config.placeholder_token)}' is not used: train_placeholder_token is false")
    reset_peak()
    training = prepare(dataset, config, base, log, processes)
    steps = training.steps(config, processes)
    figures = run(steps, config.steps, training.tokens, log)
    if processes.index > 0:
        return None
    if config.tokens:
        figures |= _diagnostics(training, log)
    figures |= _memory(training, log)
    meta = _meta(config, base, training, figures | {"processes": processes.count})
    transformer = training.trainee.transformer
    weights = Weights(lora_state_dict(transformer), training.tokens.embeddings(), meta)
    write_weights(output, weights, lora_metadata(transformer))
    prove_archive(output, weights, transformer, training.prompt_embeds, training.examples[0])
    log(
        f"Weights archive proved: {len(weights.lora)} LoRA tensors, {len(weights.embeddings)} embeddings, "
        f"{output.stat().st_size} bytes"
    )
    return meta


def with_seed(config: TrainConfig, log: Log) -> TrainConfig:
    """The configuration with the seed that the run really uses."""
    drawn = config.seed is None
    config = replace(config, seed=secrets.randbelow(MAX_SEED + 1)) if drawn else config
    log(f"Seed: {config.seed}{' (drawn)' if drawn else ''}")
    return config


def run(steps: Iterator[Step], total: int, tokens: PlaceholderTokens, log: Log) -> dict[str, Any]:
    """Go through the steps with about a hundred progress lines; returns the last mean loss and the rows' norms."""
    interval = max(1, total // 100)
    start, losses, preservations, mean_loss, recomputed = time.monotonic(), [], [], math.nan, None
    for step in steps:
        if recomputed is not None and step.recomputed != recomputed:
            log(f"Memory: step {step.number} ran out of it and was made again with {step.recomputed} blocks recomputed")
        recomputed = step.recomputed
        losses.append(step.loss)
        if step.preservation is not None:
            preservations.append(step.preservation)
        if step.number != 1 and step.number % interval and step.number != total:
            continue
        mean_loss = torch.stack(losses).mean().item()
        preservation = torch.stack(preservations).mean().item() if preservations else None
        losses, preservations = [], []
        if not math.isfinite(mean_loss + (preservation or 0.0)):
            raise RuntimeError(
                f"the loss became {mean_loss} by step {step.number}: train again with a lower learning_rate or "
                "placeholder_learning_rate"
            )
        figures = f"loss={mean_loss:.4f}"
        if preservation is not None:
            figures += f", preservation={preservation:.4f}"
        if tokens.ids:
            figures += f", row norm={tokens.rows.detach().norm(dim=1).mean().item():.3g}"
        log(tqdm.format_meter(step.number, total, time.monotonic() - start, ascii=" #", postfix=figures))
    norms = {token: rows.norm(dim=1).tolist() for token, rows in tokens.embeddings().items()}
    return {"loss": mean_loss, "placeholder_row_norms": norms, "training_seconds": round(time.monotonic() - start, 3)}


def _memory(training: Training, log: Log) -> dict[str, Any]:
    """Gigabytes at the height of the training: as planned, and as they were on a GPU."""
    expected, found = training.plan.chosen.peak(training.trainee.checkpointing.recomputed), peak_bytes()
    if found is not None:
        log(f"Memory: {found / 1e9:.1f} GB at the height, {expected / 1e9:.1f} GB expected")
    return {"expected_peak_gb": expected / 1e9, "peak_gb": None if found is None else found / 1e9}


def _diagnostics(training: Training, log: Log) -> dict[str, Any]:
    vocabulary = training.prompt_embeds.text_encoder.embed_tokens.weight
    found = diagnose(
        training.trainee, training.tokens, training.initial_rows, training.examples, vocabulary, training.tokenizer
    )
    for line in found.lines():
        log(line)
    return found.meta()


def _meta(config: TrainConfig, base: BaseModel, training: Training, figures: dict[str, Any]) -> dict[str, Any]:
    """meta.json: the resolved configuration, what was found and learned, and the versions that made it."""
    ids = next(iter(training.tokens.ids.values()), None)
    return {
        "base_model": base.source,
        "training_mode": config.training_mode,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **asdict(config),
        "resolution": ",".join(map(str, config.resolution)),
        "placeholder_token": ",".join(config.tokens) or None,
        "placeholder_token_id": ids[0] if ids else None,
        "placeholder_token_ids": training.tokens.ids,
        "lora_alpha": config.rank,
        "transformer_storage": training.plan.storage,
        "images": training.report.images,
        "captions_found": training.report.captions_found,
        "buckets": training.report.buckets,
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

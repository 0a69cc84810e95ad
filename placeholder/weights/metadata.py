"""What an archive says about its training: meta.json, and the metadata in the LoRA's safetensors header."""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

import diffusers
import peft
import torch
import transformers

from placeholder.config import TrainConfig
from placeholder.lora.formats import TOKENS_KEY
from placeholder.model.base import QWEN_IMAGE

TIME_VARIABLE = "SOURCE_DATE_EPOCH"
MEASURED = ("training_seconds", "expected_peak_gb", "peak_gb")  # which differ from run to run


def training_meta(
    config: TrainConfig, token_ids: dict[str, list[int]], found: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """meta.json: the resolved configuration, the tokens' ids, what was `found` in the dataset, `figures`, and library versions.

    With SOURCE_DATE_EPOCH it holds that time and nothing that was measured, so that the same run gives the same bytes.
    """
    ids = next(iter(token_ids.values()), None)
    fixed = fixed_time()
    if fixed:
        figures = {name: value for name, value in figures.items() if name not in MEASURED}
    return {
        "training_mode": config.training_mode,
        "created": (fixed or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **asdict(config),
        "resolution": ",".join(map(str, config.resolution)),
        "placeholder_token": ",".join(config.tokens) or None,
        "placeholder_token_id": ids[0] if ids else None,
        "placeholder_token_ids": token_ids,
        "lora_alpha": config.rank,
        **found,
        **figures,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
    }


def fixed_time() -> datetime | None:
    """The time of SOURCE_DATE_EPOCH (reproducible-builds.org); None if that is not set."""
    fixed = os.environ.get(TIME_VARIABLE)
    return datetime.fromtimestamp(int(fixed), UTC) if fixed else None


def modelspec(meta: dict[str, Any]) -> dict[str, str]:
    """What the header of the LoRA's file says: its tokens, and Stability AI's Model Metadata Standard 1.0.0, as tools show it.

    It has a date only with SOURCE_DATE_EPOCH: the same run gives the same LoRA, byte for byte.
    """
    tokens = ", ".join(meta["placeholder_token_ids"])
    side = max(map(int, meta["resolution"].split(",")))
    base = PurePath(meta["base_model"]).name
    found = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{QWEN_IMAGE.name}/lora",
        "implementation": "diffusers",
        "title": f"LoRA of {base} for {tokens}" if tokens else f"LoRA of {base}",
        "resolution": f"{side}x{side}",
    }
    if tokens:
        found["trigger_phrase"] = tokens
    if fixed_time():
        found["date"] = meta["created"]
    header = {f"modelspec.{name}": value for name, value in found.items()}
    return header | ({TOKENS_KEY: json.dumps([*meta["placeholder_token_ids"]])} if tokens else {})

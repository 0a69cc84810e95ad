"""Images generated with stock diffusers and transformers alone, which ours are compared with."""

import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file
from transformers import AddedToken

from placeholder.model.vae import as_single_frame


def stock_pipeline(model: str, two_dimensional_vae: bool = True) -> QwenImagePipeline:
    """The whole base model as stock diffusers loads it, but for its VAE in 2-D like ours, which rounds differently."""
    pipeline = QwenImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if two_dimensional_vae:
        as_single_frame(pipeline.vae)
    return pipeline


def apply_archive(pipeline: QwenImagePipeline, archive: Path, lora_scale: float = 1.0) -> None:
    """Load the LoRA, register the token for real, and write its row into the embedding matrix by id."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(archive).extractall(folder)
        pipeline.load_lora_weights(f"{folder}/lora", weight_name="lora_weights.safetensors", adapter_name="subject")
        pipeline.set_adapters(["subject"], [lora_scale])
        meta = json.loads(Path(folder, "meta.json").read_text())
        if token := meta["placeholder_token"]:
            pipeline.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
            row = load_file(Path(folder, "embeddings", f"{token.strip('<>')}.safetensors"))["qwen25_7b"]
            with torch.no_grad():
                pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids(token)] = row[0]


def stock_picture(
    model: str,
    prompt: str,
    archive: Path | None = None,
    lora_scale: float = 1.0,
    negative_prompt: str = " ",
    guidance: float = 4.0,
    steps: int = 6,
    width: int = 64,
    height: int = 64,
    seed: int = 7,
    two_dimensional_vae: bool = True,
) -> np.ndarray:
    """The generated image, uint8 (H, W, 3)."""
    pipeline = stock_pipeline(model, two_dimensional_vae)
    if archive:
        apply_archive(pipeline, archive, lora_scale)
    image = pipeline(
        prompt=prompt,
        negative_prompt=negative_prompt,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image)

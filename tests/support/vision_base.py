"""A base model with a vision tower for the tests: a tiny Qwen2.5-VL with a head, seeded and untrained."""

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from standin.small_base import TINY_SIZE, new_text_encoder

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": TINY_SIZE.text_width,
    "fullatt_block_indexes": [1],
}


def build_vision_base(folder: Path, tiny: Path) -> Path:
    """The tiny base model with another text encoder. Its captions are gibberish, but depend on the image."""
    folder.mkdir()
    for part in tiny.iterdir():
        if part.name != "text_encoder":
            (folder / part.name).symlink_to(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blind = new_text_encoder(TINY_SIZE).config
        config = Qwen2_5_VLConfig(
            text_config=blind.text_config.to_dict() | {"tie_word_embeddings": False},
            vision_config=VISION,
            tie_word_embeddings=False,
        )
        whole = Qwen2_5_VLForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.ndim > 1:  # as initialized, what is seen barely reaches the words
                    parameter.normal_(0.0, 0.25)
    whole.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    return folder

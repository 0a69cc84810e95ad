"""The text encoder with its eyes: Qwen2.5-VL whole, with the vision tower and the head for words, which else are left out."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from placeholder.models import BaseModel, default_dtype

# Pixels that a picture is scaled to before it is described: Qwen2-VL's own least, and 768 tokens of 28 x 28 at most.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 768 * 28 * 28
MAX_INPUT_IDS = 1536  # of a picture, the instruction and the description, generously
REMEDY = "write a .txt caption beside each picture, or set autocaption to false and give default_caption"


def check_sight(base: BaseModel) -> None:
    """Raise ValueError for a base model whose text encoder cannot see; only its configuration is read.

    In most blocks of the vision tower a patch attends to its neighbourhood alone (Qwen2.5-VL, arXiv:2502.13923, section 2.1):
    without one in which it attends to all, as in the small base models of demo/, nothing takes in a whole picture.
    """
    vision = base.configuration(Qwen2_5_VLConfig, "text_encoder").vision_config
    if not any(index < vision.depth for index in vision.fullatt_block_indexes):
        raise ValueError(
            f"autocaption needs a base model whose text encoder can see, and that of {base.source} has no vision tower that takes "
            f"in a whole picture: {REMEDY}"
        )


def load_with_sight(base: BaseModel) -> Qwen2_5_VLForConditionalGeneration:
    """The whole text encoder on the device, frozen. Raises ValueError where the base model does not hold all of its weights."""
    whole, found = base.component(
        Qwen2_5_VLForConditionalGeneration,
        "text_encoder",
        dtype=base.dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"autocaption needs a base model whose text encoder can see, and that of {base.source} lacks {len(missing)} weights, "
            f"such as {missing[0]}: {REMEDY}"
        )
    return whole.requires_grad_(False).eval().to(base.device)


def seeing_bytes(base: BaseModel) -> int:
    """Bytes at the height of describing a picture: all weights, the cache of keys and values, and what a vision block works on.

    That is counted as if no fused attention were there: the scores of all patches with all, twice, for the softmax.
    """
    config = base.configuration(Qwen2_5_VLConfig, "text_encoder")
    with torch.device("meta"), default_dtype(base.dtype):
        whole = Qwen2_5_VLForConditionalGeneration(config)
    weights = {id(parameter): parameter.nbytes for parameter in whole.parameters()}  # the head may be the embedding
    text, vision = config.text_config, config.vision_config
    head_width = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * MAX_INPUT_IDS
    patches = MAX_PIXELS // vision.patch_size**2
    scores = 2 * vision.num_heads * patches**2
    return sum(weights.values()) + (cached + scores) * base.dtype.itemsize

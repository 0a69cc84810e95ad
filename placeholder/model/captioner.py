"""Captions written by the text encoder's vision-language model: loading it whole, the instruction, its words cleaned up."""

import re

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from placeholder.model.base import BaseModel
from placeholder.model.loading import default_dtype

MAX_NEW_TOKENS = 96  # two sentences have about half as many
# Qwen2.5-VL's chat template for one picture and one text, without its picture's tokens and the text.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
BETWEEN, AFTER = "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
PICTURE_TOKEN, END_TOKENS = "<|image_pad|>", ("<|im_end|>", "<|endoftext|>")
# What models begin with although they were told not to.
OPENING = re.compile(
    r"(in )?(the|this) (image|picture|photo|photograph) (shows|depicts|features|captures|displays|is of) ", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")


def model_inputs(tokenizer: PreTrainedTokenizerBase, image: Image.Image, text: str) -> dict[str, Tensor]:
    """What Qwen2.5-VL takes for one picture and a text behind it, as its own processor and chat template have it.

    input_ids, attention_mask and mm_token_type_ids (1, T), pixel_values (patches, 1176), image_grid_thw (1, 3) in patches.
    """
    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    pixels = processor(images=[image], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
    picture = [tokenizer.convert_tokens_to_ids(PICTURE_TOKEN)] * count
    words = tokenizer(text, split_special_tokens=True).input_ids  # what a user writes is text and nothing else
    before, between, after = (tokenizer(part).input_ids for part in (BEFORE, BETWEEN, AFTER))
    ids = torch.tensor([before + picture + between + words + after])  # (1, T)
    kinds = torch.zeros_like(ids)
    kinds[:, len(before) : len(before) + count] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


@torch.no_grad()
def describe(
    whole: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image: Image.Image, text: str
) -> str:
    """The model's answer to the picture and the text, on one line: each token the likeliest one, so always the same."""
    inputs = {name: value.to(whole.device) for name, value in model_inputs(tokenizer, image, text).items()}
    ends = [tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS]
    first_added = min(tokenizer.get_added_vocab().values())
    # All that is no text: the added tokens, and the rows that the vocabulary has beyond the tokenizer's entries.
    suppressed = [number for number in range(first_added, whole.config.text_config.vocab_size) if number not in ends]
    # In the place of the base model's own settings, which a folder may have or not.
    whole.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[-1],
        suppress_tokens=suppressed,
    )
    found = whole.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    finished = bool(found) and found[-1] in ends
    return plain(tokenizer.decode(found, skip_special_tokens=True), finished)


def plain(text: str, finished: bool = True) -> str:
    """The text as a caption: printable, on one line, without quotation marks around it or an opening such as "The image shows".

    One that is not `finished` is cut after its last whole sentence, where it has one.
    """
    text = "".join(character if character.isprintable() else " " for character in text.replace("\ufffd", " "))
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    if opening := OPENING.match(text):
        text = text[opening.end() :]
        text = text[:1].upper() + text[1:]
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text if finished or not ends else text[: ends[-1]]


# Pixels that a picture is scaled to before it is described: Qwen2-VL's own least, and 768 tokens of 28 x 28 at most.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 768 * 28 * 28
MAX_INPUT_IDS = 1536  # of a picture, the instruction and the description, generously
REMEDY = "write a .txt caption beside each picture, or set autocaption to false and give default_caption"


def check_vision_tower(base: BaseModel) -> None:
    """Raise ValueError for a base model whose text encoder cannot see; only its configuration is read.

    In most blocks of the vision tower a patch attends to its neighborhood alone (Qwen2.5-VL, arXiv:2502.13923, section 2.1):
    without one in which it attends to all, as in the small base models of demo/, nothing takes in a whole picture.
    """
    vision = base.configuration(Qwen2_5_VLConfig, "text_encoder").vision_config
    if not any(index < vision.depth for index in vision.fullatt_block_indexes):
        raise ValueError(
            f"autocaption needs a base model whose text encoder can see, and that of {base.source} has no vision tower that takes "
            f"in a whole picture: {REMEDY}"
        )


def load_vlm(base: BaseModel) -> Qwen2_5_VLForConditionalGeneration:
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


def vlm_bytes(base: BaseModel) -> int:
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

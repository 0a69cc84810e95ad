"""Captions by Qwen2.5-VL, of which the text encoder is a part: loading it whole, its memory, and one caption of one image."""

import re

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2VLImageProcessorPil
from transformers.modeling_utils import local_torch_dtype

from placeholder.model.base import QWEN_IMAGE, BaseModel

MAX_NEW_TOKENS = 96  # two sentences have about half as many
# Pixels that an image is resized to: Qwen2-VL's own minimum, and at most 768 tokens of 28 x 28.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 768 * 28 * 28
MAX_INPUT_IDS = 1536  # of an image, the instruction and the caption, generously
# The chat template of Qwen2.5-VL for one image and one text; the repository of Qwen-Image has neither it nor a processor.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>TEXT<|im_end|>\n<|im_start|>assistant\n"
)
TEXT, IMAGE_TOKEN, END_TOKENS = "TEXT", "<|image_pad|>", ("<|im_end|>", "<|endoftext|>")
# What models begin with although they were told not to.
OPENING = re.compile(
    r"(in )?(the|this) (image|picture|photo|photograph) (shows|depicts|features|captures|displays|is of) ", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
REMEDY = "write a .txt caption for each image, or set autocaption to false and give default_caption"


def check_vision_tower(base: BaseModel) -> None:
    """Raise ValueError for a base model whose text encoder has no usable vision tower; only its configuration is read.

    In most blocks of the vision tower a patch attends to its neighborhood only (Qwen2.5-VL, arXiv:2502.13923, section 2.1).
    Without a block of full attention, as in small stand-ins, nothing takes in a whole image.
    """
    vision = base.configuration(QWEN_IMAGE.text_encoder, "text_encoder").vision_config
    if not any(index < vision.depth for index in vision.fullatt_block_indexes):
        raise ValueError(
            f"autocaption needs a base model whose text encoder can see, and that of {base.source} has no vision tower "
            f"that takes in a whole image: {REMEDY}"
        )


def load_vlm(base: BaseModel) -> nn.Module:
    """The whole Qwen2.5-VL on the device, frozen. Raises ValueError where the base model does not hold all of its weights."""
    vlm, found = base.component(
        QWEN_IMAGE.text_encoder, "text_encoder", dtype=base.dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"autocaption needs a base model whose text encoder can see, and that of {base.source} lacks "
            f"{len(missing)} weights, such as {missing[0]}: {REMEDY}"
        )
    return vlm.requires_grad_(False).eval().to(base.device)


def vlm_bytes(base: BaseModel) -> int:
    """Peak bytes of captioning an image: all weights, the key/value cache, and the activations of a vision block.

    These are counted as if there were no fused attention: the scores of all patches with all, twice, for the softmax.
    """
    config = base.configuration(QWEN_IMAGE.text_encoder, "text_encoder")
    with torch.device("meta"), local_torch_dtype(base.dtype):
        vlm = QWEN_IMAGE.text_encoder(config)
    text, vision = config.text_config, config.vision_config
    head_width = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * MAX_INPUT_IDS
    scores = 2 * vision.num_heads * (MAX_PIXELS // vision.patch_size**2) ** 2
    return sum(parameter.nbytes for parameter in vlm.parameters()) + (cached + scores) * base.dtype.itemsize


def vlm_inputs(tokenizer: PreTrainedTokenizerBase, image: Image.Image, text: str) -> dict[str, Tensor]:
    """The inputs of Qwen2.5-VL for an image followed by a text, as its own processor and chat template make them.

    input_ids, attention_mask and mm_token_type_ids (1, T), pixel_values (patches, 1176), image_grid_thw (1, 3) in patches.
    """
    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    vision = processor(images=[image], return_tensors="pt")
    image_tokens = int(vision["image_grid_thw"].prod()) // processor.merge_size**2
    before, after = CHAT.format(image=IMAGE_TOKEN * image_tokens).split(TEXT)
    text_ids = tokenizer(text, split_special_tokens=True).input_ids  # a user's words are text, whatever they are
    input_ids = torch.tensor([tokenizer(before).input_ids + text_ids + tokenizer(after).input_ids])
    is_image = input_ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    masks = {"attention_mask": torch.ones_like(input_ids), "mm_token_type_ids": is_image.long()}
    return {"input_ids": input_ids, **masks, **vision}


@torch.no_grad()
def describe(
    vlm: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    image: Image.Image,
    instruction: str,
    max_new_tokens: int | None = None,  # MAX_NEW_TOKENS
) -> str:
    """The model's answer to image and instruction, as a caption on one line, decoded greedily: always the same."""
    inputs = {name: value.to(vlm.device) for name, value in vlm_inputs(tokenizer, image, instruction).items()}
    ends = [tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS]
    first_added = min(tokenizer.get_added_vocab().values())
    # Everything that is not text: the added tokens, and the vocabulary's rows beyond the tokenizer's entries.
    suppressed = [token for token in range(first_added, vlm.config.text_config.vocab_size) if token not in ends]
    # Replaces the base model's own settings, which a folder may have or not.
    vlm.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[-1],
        suppress_tokens=suppressed,
    )
    answer = vlm.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    return plain(tokenizer.decode(answer, skip_special_tokens=True), finished=answer[-1] in ends)


def plain(text: str, finished: bool = True) -> str:
    """The text as a caption: printable, on one line, without quotation marks around it or an opening such as "The image shows".

    One that is not `finished` is cut after its last complete sentence, if it has one.
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

"""From a prompt to ComfyUI's token lists, with learned rows in the places of their tokens."""

import re
from typing import Any

from torch import Tensor

from .rows import KEY

EMPTY_PROMPT = " "  # Qwen-Image's own examples use a space for a prompt that says nothing, and so did the training
OWN_TEMPLATE = ("<|im_start|>", "<|start_header_id|>")  # ComfyUI puts no template around a text that begins so
Pair = tuple[int | Tensor, float]  # a token id, or a row (D,) that stands in the place of one, and its weight


def tokenize(clip: Any, text: str, embeddings: dict[str, Tensor]) -> dict[str, list[list[Pair]]]:
    """ComfyUI's token lists of a prompt for its Qwen-Image text encoder `clip`.

    The prompt is split at its tokens and the pieces are tokenized as they are, the first one behind the template's prefix and
    the last one before its suffix: the way of the training. A prompt without a token is left to ComfyUI altogether.
    """
    prefix, suffix = template(clip, embeddings)
    text = text or EMPTY_PROMPT
    # Longest first, so that of two tokens that start at one place the longer one is meant.
    pattern = re.compile("|".join(map(re.escape, sorted(embeddings, key=len, reverse=True))) or "(?!)")
    found = pattern.findall(text)
    if not found:
        return clip.tokenize(text)
    pieces = pattern.split(text)
    if not text.startswith(OWN_TEMPLATE):
        pieces[0] = prefix + pieces[0]
        pieces[-1] = pieces[-1] + suffix
    pairs = _pairs(clip, pieces[0])
    for token, piece in zip(found, pieces[1:], strict=True):
        pairs += [(row, 1.0) for row in embeddings[token]]
        pairs += _pairs(clip, piece)
    return {KEY: [pairs]}


def template(clip: Any, embeddings: dict[str, Tensor]) -> tuple[str, str]:
    """What ComfyUI puts before and after a prompt; ValueError for another model's CLIP, and for rows of another width."""
    tokenizer = getattr(clip, "tokenizer", None)
    inner = getattr(tokenizer, KEY, None)
    prefix, hole, suffix = getattr(tokenizer, "llama_template", "").partition("{}")
    if inner is None or not hole:
        raise ValueError("this CLIP is not the text encoder of Qwen-Image: load it with CLIPLoader, type qwen_image")
    for token, rows in embeddings.items():
        if rows.shape[1] != inner.embedding_size:
            raise ValueError(
                f"the rows of {token} have {rows.shape[1]} numbers, this CLIP takes {inner.embedding_size}: "
                "they were trained for another model"
            )
    return prefix, suffix


def _pairs(clip: Any, piece: str) -> list[Pair]:
    """The ids of a piece of text and their weights, with no template; of an empty one ComfyUI would make a padding token."""
    batches = clip.tokenize(piece, llama_template="{}")[KEY] if piece else []
    return [pair for batch in batches for pair in batch]

"""Checks of placeholder tokens against the tokenizer's vocabulary: which tokens can be new, and which ids they get."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.errors import shown
from placeholder.tokens.placeholder_tokens import PlaceholderTokens

ROWS_AT_ONCE = 1024  # of the embedding matrix, in float32: 15 MB stay in a processor's cache, the whole are 2 GB
MAX_TOKENS = 64  # of one training or one archive
MAX_TOKEN_BYTES = 64  # its file in the archive has a percent-encoded name of at most three times as many


def check_word(token: str) -> None:
    """Raise ValueError for a token that is not one printable word of at most MAX_TOKEN_BYTES."""
    if not token or token != "".join(token.split()) or not token.isprintable():
        raise ValueError(f"placeholder_token {shown(token)} is empty or holds white space: give one word such as <zwx>")
    if (size := len(token.encode())) > MAX_TOKEN_BYTES:
        raise ValueError(f"placeholder_token {shown(token)} has {size} bytes in UTF-8: give at most {MAX_TOKEN_BYTES}")


def check_tokens(tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Raise ValueError for a token that cannot be a zero-prior placeholder; returns warnings about unbracketed ones."""
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"placeholder_token names {len(tokens)} tokens: give at most {MAX_TOKENS}")
    known = set(tokenizer.get_added_vocab())
    warnings = []
    for position, token in enumerate(tokens):
        check_word(token)
        pieces = tokenizer(token).input_ids
        if len(pieces) == 1 or len(tokenizer(" " + token).input_ids) == 1:
            raise ValueError(
                f"placeholder_token {token!r} is already a token of the vocabulary, so it has a prior: "
                "give a new one such as <zwx>"
            )
        overlap = [other for other in (*known, *tokens[:position], *tokens[position + 1 :]) if token in other or other in token]
        if overlap:
            raise ValueError(
                f"placeholder_token {token!r} overlaps with {overlap[0]!r}: give tokens that do not contain each other"
            )
        if not (token.startswith("<") and token.endswith(">")):
            warnings.append(
                f"placeholder_token {token!r} is split into {pieces} by the base tokenizer and is not bracketed: "
                f"it will also be found inside longer words, write '<{token}>'"
            )
    return warnings


def archive_tokens(
    embeddings: dict[str, Tensor], trained_ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, width: int
) -> PlaceholderTokens:
    """An archive's tokens with the ids after this tokenizer's last; ValueError unless they had the same ids in training."""
    check_tokens(tuple(embeddings), tokenizer)
    tokens = PlaceholderTokens(len(tokenizer), embeddings, width)
    if tokens.ids != trained_ids:
        raise ValueError(
            f"the token ids of the archive are {shown(trained_ids)}, here they are {shown(tokens.ids)}: "
            "it was trained on another base"
        )
    return tokens


@torch.no_grad()
def row_norms(embedding_matrix: Tensor, entries: int) -> Tensor:
    """The norms (entries,) of the first rows of an embedding matrix (rows, D), in float32; the rest is padding."""
    parts = embedding_matrix[:entries].split(ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts])

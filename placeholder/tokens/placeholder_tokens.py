"""Zero-prior placeholder tokens: new ids after the tokenizer's last, with embedding rows of their own.

Neither the tokenizer nor the text encoder is changed. A prompt is split at its placeholders, the pieces are tokenized as
they are, and the new ids are spliced in; where a new id stands, its row is put in the place of the vocabulary's.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.errors import shown

MAX_TOKENS = 64  # of one training or one archive
MAX_TOKEN_BYTES = 64  # its file in the archive has a percent-encoded name of at most three times as many


class PlaceholderTokens(nn.Module):
    """The placeholder tokens of one training or one archive, with their learned rows.

    `rows`: fp32 parameter (R, D), one row for each new id, in the order of the ids from `first_id`. A token has one id or
    several consecutive ones. With no tokens, everything passes through untouched.
    """

    def __init__(self, first_id: int, embeddings: dict[str, Tensor], width: int):
        super().__init__()
        self.first_id = first_id
        self.ids: dict[str, list[int]] = {}
        for token, rows in embeddings.items():
            if rows.ndim != 2 or rows.shape[1] != width:
                raise ValueError(f"the embedding of {token} has shape {tuple(rows.shape)}: this base model takes (k, {width})")
            start = first_id + sum(map(len, self.ids.values()))
            self.ids[token] = list(range(start, start + len(rows)))
        self.rows = nn.Parameter(torch.cat([torch.empty(0, width), *(rows.float() for rows in embeddings.values())]))
        # Longest first, so that of two tokens that start at one place the longer one is meant, as in a tokenizer.
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or "(?!)")

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, prompt: str, prefix: str = "", suffix: str = "") -> list[int]:
        """Token ids of `prefix + prompt + suffix`, with placeholders recognized in the prompt alone."""
        pieces = self._pattern.split(prompt)
        pieces[0] = prefix + pieces[0]
        pieces[-1] = pieces[-1] + suffix
        ids = list(tokenizer(pieces[0]).input_ids)
        for token, piece in zip(self._pattern.findall(prompt), pieces[1:], strict=True):
            ids += self.ids[token]
            ids += tokenizer(piece).input_ids
        return ids

    def contains(self, input_ids: list[int]) -> bool:
        """Whether any of the ids is a placeholder's."""
        return any(self.first_id <= token_id < self.first_id + len(self.rows) for token_id in input_ids)

    def embed(self, embed_tokens: nn.Embedding, input_ids: Tensor) -> Tensor:
        """Input embeddings (B, T, D) of ids (B, T): the vocabulary's rows, and ours where our ids stand.

        The vocabulary is read at id 0 there, so the new ids need no row in it and it is never resized.
        """
        if len(self.rows) == 0:
            return embed_tokens(input_ids)
        local = input_ids - self.first_id  # (B, T)
        is_placeholder = (local >= 0) & (local < len(self.rows))
        vocabulary = embed_tokens(input_ids.masked_fill(is_placeholder, 0))  # (B, T, D)
        learned = nn.functional.embedding(local.clamp(0, len(self.rows) - 1), self.rows)  # (B, T, D)
        return torch.where(is_placeholder[..., None], learned.to(vocabulary.dtype), vocabulary)

    def embeddings(self) -> dict[str, Tensor]:
        """A copy of each token's rows on the CPU: fp32 (k, D)."""
        rows = self.rows.detach().float().cpu()
        return {token: rows[ids[0] - self.first_id : ids[-1] - self.first_id + 1].clone() for token, ids in self.ids.items()}


def initial_embeddings(
    tokens: tuple[str, ...], width: int, std: float, generator: torch.Generator, vectors: int = 1
) -> dict[str, Tensor]:
    """Rows (vectors, width) for each token from N(0, std^2); std 0.0 gives exact zeros."""
    return {token: torch.randn(vectors, width, generator=generator) * std for token in tokens}


def fresh_tokens(
    config: TrainConfig, width: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, log: Callable[[str], None]
) -> PlaceholderTokens:
    """A training's tokens with rows drawn from `generator`; the log tells their ids."""
    embeddings = initial_embeddings(config.tokens, width, config.placeholder_init_std, generator, config.placeholder_vectors)
    tokens = PlaceholderTokens(len(tokenizer), embeddings, width)
    for token, ids in tokens.ids.items():
        log(f"Placeholder token '{token}' registered with ID: {', '.join(map(str, ids))}")
    if tokens.ids:
        ids = [str(token_id) for token_ids in tokens.ids.values() for token_id in token_ids]
        only = f"token {ids[0]} receives" if len(ids) == 1 else f"tokens {', '.join(ids)} receive"
        log(f"Gradient mask active: only {only} updates")
    return tokens


def check_word(token: str) -> None:
    """Raise ValueError for a token that is not one printable word of at most MAX_TOKEN_BYTES."""
    if not token or token != "".join(token.split()) or not token.isprintable():
        raise ValueError(f"placeholder_token {shown(token)} is empty or holds white space: give one word such as <zwx>")
    if (size := len(token.encode())) > MAX_TOKEN_BYTES:
        raise ValueError(f"placeholder_token {shown(token)} has {size} bytes in UTF-8: give at most {MAX_TOKEN_BYTES}")


def check_tokens(tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Raise ValueError for a token that cannot be a zero-prior placeholder; returns warnings about the others."""
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"placeholder_token names {len(tokens)} tokens: give at most {MAX_TOKENS}")
    known = set(tokenizer.get_added_vocab())
    warnings = []
    for position, token in enumerate(tokens):
        check_word(token)
        pieces = tokenizer(token).input_ids
        if len(pieces) == 1 or len(tokenizer(" " + token).input_ids) == 1:
            raise ValueError(
                f"placeholder_token {token!r} is already a token of the vocabulary, so it has a prior: give a new one such as <zwx>"
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
    """An archive's tokens, registered behind this tokenizer's last id; ValueError unless that is where they were in training."""
    check_tokens(tuple(embeddings), tokenizer)
    tokens = PlaceholderTokens(len(tokenizer), embeddings, width)
    if tokens.ids != trained_ids:
        raise ValueError(
            f"the token ids of the archive are {shown(trained_ids)}, here they are {shown(tokens.ids)}: "
            "it was trained on another base"
        )
    return tokens


def place_token(caption: str, tokens: tuple[str, ...], name: str) -> tuple[str, bool]:
    """The caption with its token, and whether the token had to be put in front.

    `<>` and `[trigger]` become the token. With several tokens a caption has to name one itself, because nobody could tell
    which is meant; one that does not raises ValueError with the picture's `name`.
    """
    if len(tokens) == 1:
        caption = caption.replace("<>", tokens[0]).replace("[trigger]", tokens[0])
    if any(token in caption for token in tokens):
        return caption, False
    if len(tokens) > 1:
        raise ValueError(
            f"the caption of {name} names none of {', '.join(tokens)}: with several tokens each caption says which"
        )
    return f"{tokens[0]} {caption}".rstrip(), True


def without_token(caption: str, tokens: tuple[str, ...], class_word: str) -> str:
    """The caption with `class_word` (or, where that is empty, nothing) in the place of each placeholder token."""
    for token in tokens:
        caption = caption.replace(token, class_word)
    return " ".join(caption.split())

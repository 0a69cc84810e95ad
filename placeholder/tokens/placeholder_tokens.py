"""Zero-prior placeholder tokens: new ids after the tokenizer's last, with token embeddings of their own.

Neither the tokenizer nor the text encoder is changed. A prompt is split at its placeholders, the pieces are tokenized as
they are, and the new ids are inserted between them; at a new id, its learned embedding replaces the vocabulary's.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.devices import to_device
from placeholder.errors import Log


class PlaceholderTokens(nn.Module):
    """The placeholder tokens of one training or of the archives in use, with their learned token embeddings.

    `rows`: fp32 parameter (R, D), one row for each new id, in the order of the ids from `first_id`. A token has one id or
    several consecutive ones. Without tokens, prompts and embeddings pass through unchanged.
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
        # Longest first: of two tokens that start at the same place the longer one is meant, as in a tokenizer.
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

    def named(self, input_ids: Sequence[int]) -> set[str]:
        """The tokens that a prompt of these ids names."""
        return {token for token, ids in self.ids.items() if {*ids} <= {*input_ids}}

    def embed(self, embed_tokens: nn.Embedding, input_ids: Tensor) -> Tensor:
        """Input embeddings (B, T, D) of ids (B, T): the vocabulary's rows, and the learned rows at the placeholders' ids.

        The ids are where `embed_tokens` is, which may be another device than that of the learned rows and of the result. The
        vocabulary is read at id 0 for placeholders, so the new ids need no row in it and it is never resized.
        """
        device = self.rows.device
        if len(self.rows) == 0:
            return to_device(embed_tokens(input_ids), device)
        local = input_ids - self.first_id  # (B, T)
        local = local.masked_fill((local < 0) | (local >= len(self.rows)), -1)
        vocabulary = to_device(embed_tokens(input_ids.masked_fill(local >= 0, 0)), device)  # (B, T, D)
        local = to_device(local, device)
        learned = nn.functional.embedding(local.clamp(min=0), self.rows)  # (B, T, D)
        return torch.where(local[..., None] >= 0, learned.to(vocabulary.dtype), vocabulary)

    def embeddings(self) -> dict[str, Tensor]:
        """A copy of each token's rows on the CPU: fp32 (k, D)."""
        rows = self.rows.detach().float().cpu()
        return {token: rows[ids[0] - self.first_id : ids[-1] - self.first_id + 1].clone() for token, ids in self.ids.items()}

    def registered(self) -> list[str]:
        """A log line for each token that says which ids it has."""
        return [f"Placeholder token '{token}' registered with ID: {_listed(ids)}" for token, ids in self.ids.items()]


def initial_embeddings(
    tokens: tuple[str, ...], width: int, std: float, generator: torch.Generator, vectors: int = 1
) -> dict[str, Tensor]:
    """Rows (vectors, width) for each token from N(0, std^2); std 0.0 gives exact zeros."""
    return {token: torch.randn(vectors, width, generator=generator) * std for token in tokens}


def fresh_tokens(
    config: TrainConfig, width: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, log: Log
) -> PlaceholderTokens:
    """The tokens of a training, with rows drawn from `generator`; logs their ids."""
    embeddings = initial_embeddings(config.tokens, width, config.placeholder_init_std, generator, config.placeholder_vectors)
    tokens = PlaceholderTokens(len(tokenizer), embeddings, width)
    for line in tokens.registered():
        log(line)
    if ids := [token_id for ids in tokens.ids.values() for token_id in ids]:
        receive = "token {} receives" if len(ids) == 1 else "tokens {} receive"
        log(f"Gradient mask active: only {receive.format(_listed(ids))} updates")
    return tokens


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))

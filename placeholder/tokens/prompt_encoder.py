"""From prompts to prompt_embeds, in one way for training and prediction: ids inside the template, then the text encoder."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.model.base import QWEN_IMAGE
from placeholder.tokens.placeholder_tokens import PlaceholderTokens

# The prompt that says nothing, for classifier-free guidance and caption dropout; Qwen-Image's own examples use a space.
EMPTY_PROMPT = " "


class TokenizedPrompt(NamedTuple):
    """A prompt as ids: `ids` inside the template, as they are encoded; of the prompt itself the `used` and the `left_out`."""

    ids: tuple[int, ...]
    used: tuple[int, ...]
    left_out: tuple[int, ...]

    def lost(self, tokens: PlaceholderTokens) -> list[str]:
        """The tokens that the prompt names where it is left out."""
        return [token for token, ids in tokens.ids.items() if {*ids} & {*self.left_out} and not {*ids} <= {*self.used}]

    def cut(self, tokens: PlaceholderTokens) -> str:
        """What is left out, in words; empty where nothing is."""
        if not self.left_out:
            return ""
        count, lost = len(self.left_out), self.lost(tokens)
        return (
            f"{count} of {len(self.used) + count} tokens are left out{', among them ' if lost else ''}{', '.join(lost)} "
            f"(a prompt is cut after {QWEN_IMAGE.max_prompt_tokens})"
        )


def tokenized(tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, prompt: str) -> TokenizedPrompt:
    """The ids of a prompt inside the template, with the placeholders' ids in their places.

    Cut after the most tokens that the pipeline takes, as it does it. An empty prompt counts as EMPTY_PROMPT.
    """
    suffix, dropped, most = QWEN_IMAGE.prompt_suffix, QWEN_IMAGE.dropped_tokens, QWEN_IMAGE.max_prompt_tokens
    ids = tuple(tokens.tokenize(tokenizer, prompt or EMPTY_PROMPT, QWEN_IMAGE.prompt_prefix, suffix))
    own = ids[dropped : len(ids) - len(tokenizer(suffix).input_ids)]
    return TokenizedPrompt(ids[: dropped + most], own[:most], own[most:])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, prompt: str) -> tuple[int, ...]:
    """The ids of a prompt as they are encoded, see `tokenized`."""
    return tokenized(tokenizer, tokens, prompt).ids


def encode_prompts(text_encoder: nn.Module, tokens: PlaceholderTokens, input_ids: Tensor) -> Tensor:
    """Prompt embeddings (B, T - dropped, D) of ids (B, T) from `prompt_ids`: no padding, no mask; gradients reach the rows."""
    inputs_embeds = tokens.embed(text_encoder.embed_tokens, input_ids)  # (B, T, D)
    hidden = text_encoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state  # (B, T, D)
    return hidden[:, QWEN_IMAGE.dropped_tokens :]


def pipeline_inputs(prompt_embeds: Tensor, negative: Tensor | None = None) -> dict[str, Tensor]:
    """The arguments of QwenImagePipeline for embeddings (B, T, D) of the prompt and of the negative prompt, without padding."""
    inputs = {}
    for prefix, embeds in (("", prompt_embeds), ("negative_", negative)):
        if embeds is not None:
            inputs[f"{prefix}prompt_embeds"] = embeds
            inputs[f"{prefix}prompt_embeds_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return inputs


class PromptEncoder:
    """prompt_embeds of prompts given as ids: cached where they cannot change, encoded anew where they hold a placeholder."""

    def __init__(self, text_encoder: nn.Module, tokens: PlaceholderTokens):
        self.text_encoder: nn.Module | None = text_encoder
        self.tokens = tokens
        self._cached: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def cache(self, prompts: Iterable[tuple[int, ...]]) -> int:
        """Encode the prompts without a placeholder, once each; returns how many prompts are cached."""
        for ids in prompts:
            if ids not in self._cached and not self.tokens.contains(list(ids)):
                self._cached[ids] = self._encode([ids])[0].clone()  # without the rows of the template
        return len(self._cached)

    def release(self) -> None:
        """Drop the text encoder; from here on only cached prompts are available."""
        self.text_encoder = None

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """prompt_embeds (B, T, D) of B prompts of one length, with gradients to the rows of their placeholders."""
        if all(ids in self._cached for ids in prompts):
            return torch.stack([self._cached[ids] for ids in prompts])
        return self._encode(prompts)

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        return encode_prompts(self.text_encoder, self.tokens, torch.tensor(prompts))

"""From prompts to embeddings, the one way for training and prediction: ids inside the template, then the text encoder."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from placeholder.devices import to_device
from placeholder.model.base import QWEN_IMAGE
from placeholder.tokens.placeholder_tokens import PlaceholderTokens

# Classifier-free guidance and caption dropout need a prompt that says nothing; the model's own examples use a space.
EMPTY_PROMPT = " "

TemplateStates = list[tuple[Tensor, Tensor]]
"""Of each layer the keys and values (1, heads, T, head width) of the tokens before the prompt."""


def prompt_template() -> tuple[str, str, int]:
    """What stands before and after a prompt, and how many tokens of it are dropped from the embeddings."""
    return QWEN_IMAGE.prompt_prefix, QWEN_IMAGE.prompt_suffix, QWEN_IMAGE.dropped_tokens


def prompt_ids(tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, prompt: str) -> tuple[int, ...]:
    """The ids of a prompt inside the template, placeholders spliced in; the one way from text to ids.

    Cut after the most tokens of a prompt that the pipeline takes. An empty prompt counts as EMPTY_PROMPT.
    """
    prefix, suffix, dropped = prompt_template()
    return tuple(tokens.tokenize(tokenizer, prompt or EMPTY_PROMPT, prefix, suffix)[: dropped + QWEN_IMAGE.max_prompt_tokens])


def encode_prompts(
    text_encoder: nn.Module, tokens: PlaceholderTokens, input_ids: Tensor, template: TemplateStates | None = None
) -> Tensor:
    """Prompt embeddings (B, T - dropped, D) of ids (B, T) from `prompt_ids`; no padding, so no mask. Gradients reach the rows.

    With the states of the `template` that stands before all of these prompts it is not run again: nothing in it looks at what
    comes after it. The embeddings are the same up to rounding.
    """
    dropped = prompt_template()[2]
    if template is None:
        inputs_embeds = tokens.embed(text_encoder.embed_tokens, input_ids)  # (B, T, D)
        hidden = text_encoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state  # (B, T, D)
        return hidden[:, dropped:]
    inputs_embeds = tokens.embed(text_encoder.embed_tokens, input_ids[:, dropped:])  # (B, T - dropped, D)
    before = DynamicCache([tuple(states.expand(len(input_ids), -1, -1, -1) for states in layer) for layer in template])
    length = inputs_embeds.shape[1]
    causal = torch.ones(length, dropped + length, dtype=torch.bool, device=input_ids.device).tril(dropped)[None, None]
    masks = dict.fromkeys(text_encoder.config.layer_types, causal)  # what transformers would make in every call, at some length
    return text_encoder(
        inputs_embeds=inputs_embeds, attention_mask=masks, past_key_values=before, use_cache=True
    ).last_hidden_state


@torch.no_grad()
def template_states(text_encoder: nn.Module, input_ids: Tensor) -> TemplateStates:
    """The keys and values of ids (1, T) that hold no placeholder."""
    past = DynamicCache(config=text_encoder.config)
    text_encoder(input_ids=input_ids, past_key_values=past, use_cache=True)
    return [(layer.keys, layer.values) for layer in past.layers]


def pipeline_inputs(prompt_embeds: Tensor, negative: Tensor | None = None) -> dict[str, Tensor]:
    """What the pipeline takes for embeddings (B, T, D) of a prompt and of what guidance leads away from: no padding anywhere."""
    inputs = {}
    for prefix, embeds in (("", prompt_embeds), ("negative_", negative)):
        if embeds is not None:
            inputs[f"{prefix}prompt_embeds"] = embeds
            inputs[f"{prefix}prompt_embeds_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return inputs


class PromptEmbeddings:
    """Prompt embeddings on demand: from the cache where they cannot change, from the text encoder where a row may have."""

    def __init__(self, text_encoder: nn.Module, tokens: PlaceholderTokens):
        self.text_encoder: nn.Module | None = text_encoder
        self.tokens = tokens
        self._cached: dict[tuple[int, ...], Tensor] = {}
        self._templates: dict[tuple[int, ...], TemplateStates] = {}  # one, and more where a prompt begins with a line break

    @torch.no_grad()
    def cache(self, prompts: Iterable[tuple[int, ...]]) -> int:
        """Encode the prompts (as ids) that hold no placeholder, once; returns how many prompts are cached."""
        for ids in prompts:
            if ids not in self._cached and not self.tokens.contains(list(ids)):
                self._cached[ids] = self._encode([ids])[0]
        return len(self._cached)

    def release(self) -> None:
        """Let go of the text encoder; from here on only cached prompts can be had."""
        self.text_encoder = None
        self._templates.clear()

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Embeddings (n, T, D) of n prompts of one length, with gradients to the rows of placeholders."""
        if all(ids in self._cached for ids in prompts):
            return torch.stack([self._cached[ids] for ids in prompts])
        return self._encode(prompts)

    def window(self, prompts: Sequence[tuple[int, ...]]) -> "Window":
        """Embeddings of prompts of any lengths, of which those that may have changed are encoded now, in one call."""
        changed = [ids for ids in dict.fromkeys(prompts) if ids not in self._cached]
        if not changed:
            return Window(self, {})
        longest, dropped = max(map(len, changed)), prompt_template()[2]
        # What is put behind a prompt changes nothing in it: each token looks at those before it alone.
        embeds = self._encode([ids + ids[-1:] * (longest - len(ids)) for ids in changed])  # (n, T, D)
        return Window(self, {ids: found[: len(ids) - dropped] for ids, found in zip(changed, embeds, strict=True)})

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        heads = {ids[: prompt_template()[2]] for ids in prompts}
        template = self._template(heads.pop()) if len(heads) == 1 else None
        return encode_prompts(self.text_encoder, self.tokens, self._ids(prompts), template)

    def _template(self, head: tuple[int, ...]) -> TemplateStates:
        if head not in self._templates:
            self._templates[head] = template_states(self.text_encoder, self._ids([head]))
        return self._templates[head]

    def _ids(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        return to_device(torch.tensor(prompts), self.tokens.rows.device)  # (n, T)


class Window:
    """The prompts of one step, encoded once however many parts the step is made in; called like PromptEmbeddings.

    The parts' backward passes end at the embeddings; `backward` goes on from there through the text encoder, once for all.
    """

    def __init__(self, embeddings: PromptEmbeddings, encoded: dict[tuple[int, ...], Tensor]):
        self._embeddings = embeddings
        self._encoded = encoded
        self._ends = {ids: found.detach().requires_grad_(found.requires_grad) for ids, found in encoded.items()}

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Embeddings (n, T, D) of n prompts of one length, each of the step's or a cached one."""
        return torch.stack([self._ends[ids] if ids in self._ends else self._embeddings([ids])[0] for ids in prompts])

    def backward(self) -> None:
        """Add to the gradients of the rows what has come together at the embeddings."""
        reached = [(self._encoded[ids], end.grad) for ids, end in self._ends.items() if end.grad is not None]
        if reached:
            torch.autograd.backward(*zip(*reached, strict=True))

"""The prompts of a training as ids: captions inside the template, and the prompts that prior preservation keeps."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.captions import Caption, draft, preserved_prompts, trained_captions
from placeholder.data.dataset import Photo
from placeholder.errors import Log
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import prompt_ids


@dataclass(frozen=True)
class Prompts:
    """The captions as ids inside the template, and for each of them the ids of the prompts to preserve."""

    ids: list[tuple[int, ...]]
    preserved: list[tuple[tuple[int, ...], ...]]

    @property
    def longest(self) -> int:
        """The number of ids of the longest prompt."""
        return max(len(ids) for ids in (*self.ids, *(ids for kept in self.preserved for ids in kept)))


def prompts_of(
    captions: list[Caption], config: TrainConfig, tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens, log: Log
) -> Prompts:
    """The ids of the captions, and of the prompts to preserve with them."""
    texts = [caption.text for caption in captions]
    ids = [prompt_ids(tokenizer, tokens, text) for text in texts]
    preserved = [
        tuple(prompt_ids(tokenizer, tokens, prompt) for prompt in prompts) for prompts in preserved_prompts(texts, config, log)
    ]
    if config.log_prompt_ids:
        for text in dict.fromkeys(texts):
            log(f"Prompt '{text}' tokenized to: {tokens.tokenize(tokenizer, text)}")
    return Prompts(ids, preserved)


def draft_length(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens) -> int:
    """The number of ids of the longest prompt that autocaption may make."""
    (caption,) = trained_captions([Photo("", None, ())], config, lambda line: None, [draft(config)])
    return len(prompt_ids(tokenizer, tokens, caption.text))

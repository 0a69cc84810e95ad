"""Images from a transformer in training, many at a time, at fixed seeds."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.lora.adapter import ADAPTER
from placeholder.lora.gate import gated
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_scheduler, load_vae
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, encode_prompts, pipeline_inputs, prompt_ids
from standin.world import SIDE

STEPS, GUIDANCE, SEED = 20, 4.0, 5  # the guidance of Qwen-Image's own examples
BATCH = 12  # images


class Sampler:
    """The pipeline around a transformer that is being trained, with its text encoder and tokens.

    `acts` says for which prompts the LoRA acts; None: for all, without a gate.
    """

    acts: Callable[[str], bool] | None = None

    def __init__(
        self,
        base: BaseModel,
        transformer: QwenImageTransformer2DModel,
        text_encoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tokens: PlaceholderTokens,
        side: int = SIDE,
        steps: int = STEPS,
    ):
        self.transformer, self.text_encoder, self.tokenizer, self.tokens = transformer, text_encoder, tokenizer, tokens
        self.side, self.steps = side, steps
        self.pipeline = QwenImagePipeline(load_scheduler(base), load_vae(base, base.dtype), None, None, transformer)
        self.pipeline.set_progress_bar_config(disable=True)

    def sample(self, prompt: str, count: int) -> list[Image.Image]:
        """`count` images of the prompt; the same noise for every prompt."""
        return self.sample_all([prompt], count)[0]

    def sample_all(self, prompts: Sequence[str], count: int) -> list[list[Image.Image]]:
        """`count` images of each prompt. Prompts of the same number of tokens share a batch of up to BATCH images."""
        embeds = [self._encode(prompt) for prompt in prompts]  # (1, T, D) each
        by_length: dict[int, list[int]] = {}
        for index, embed in enumerate(embeds):
            by_length.setdefault(embed.shape[1], []).append(index)
        found: list[list[Image.Image]] = [[] for _ in prompts]
        most = max(1, BATCH // count)
        with gated(self.transformer) if self.acts else nullcontext() as gate:
            for text in (*prompts, EMPTY_PROMPT) if gate else ():
                gate.remember(self._encode(text)[0], () if self.acts(text) else (ADAPTER,))
            for indices in by_length.values():
                for batch in (indices[start : start + most] for start in range(0, len(indices), most)):
                    images = self._generate(torch.cat([embeds[index] for index in batch]), count)
                    for place, index in enumerate(batch):
                        found[index] = images[place * count :][:count]
        return found

    @torch.no_grad()
    def _generate(self, embeds: Tensor, count: int) -> list[Image.Image]:
        """`count` images of each prompt's embeddings (P, T, D), prompt by prompt."""
        negative = self._encode(EMPTY_PROMPT).expand(len(embeds), -1, -1)
        return self.pipeline(
            **pipeline_inputs(*(some.repeat_interleave(count, dim=0) for some in (embeds, negative))),
            true_cfg_scale=GUIDANCE,
            width=self.side,
            height=self.side,
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(SEED + number) for _ in embeds for number in range(count)],
        ).images

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        ids = torch.tensor([prompt_ids(self.tokenizer, self.tokens, prompt)])
        return encode_prompts(self.text_encoder, self.tokens, ids)

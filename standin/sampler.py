"""Images from a transformer in training, many of one prompt at a time, at fixed seeds."""

from collections.abc import Callable
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

    def sample_all(self, prompts: list[str] | tuple[str, ...], count: int) -> list[list[Image.Image]]:
        """`count` images of each prompt."""
        return [self.sample(prompt, count) for prompt in prompts]

    @torch.no_grad()
    def sample(self, prompt: str, count: int) -> list[Image.Image]:
        """`count` images of the prompt; the same noise for every prompt."""
        embeds, negative = self._encode(prompt, count), self._encode(EMPTY_PROMPT, count)
        with gated(self.transformer) if self.acts else nullcontext() as gate:
            for text, found in ((prompt, embeds), (EMPTY_PROMPT, negative)) if gate else ():
                gate.remember(found[0], () if self.acts(text) else (ADAPTER,))
            return self.pipeline(
                **pipeline_inputs(embeds, negative),
                true_cfg_scale=GUIDANCE,
                width=self.side,
                height=self.side,
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(SEED),
            ).images

    def _encode(self, prompt: str, count: int) -> Tensor:
        ids = torch.tensor([prompt_ids(self.tokenizer, self.tokens, prompt)])
        return encode_prompts(self.text_encoder, self.tokens, ids).repeat(count, 1, 1)

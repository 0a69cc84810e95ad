"""Pictures of a training, drawn with the models that it has in memory: between its steps, and side by side at its end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import retrieve_timesteps
from PIL import Image
from torch import Tensor

from placeholder.config import TrainConfig
from placeholder.data.captions import without_token
from placeholder.devices import free_memory
from placeholder.lora.adapter import without_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_scheduler, load_vae, shift_constants
from placeholder.model.vae import PIXELS_A_TOKEN
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEncoder, pipeline_inputs
from placeholder.training.diagnostics import rows_as
from placeholder.training.flow import shift_mu

STEPS, GUIDANCE, SEED = 20, 4.0, 0  # the guidance of Qwen-Image's own examples, fewer steps; the same noise for every picture
MAX_SIDE = 512  # pixels: at full size a picture then costs about seven training steps (counted in FLOPs)
CAPTIONS = 3  # how many of the data set's stand in for prompts that are not given
STEPS_A_CAPTION = 300  # of training: in fewer steps the pictures of more captions would cost a large part of the training
BASE, ROW_RESET, TRAINED = "base model", "LoRA, token reset", "LoRA and token"
TRAINED_BASELINE = "LoRA"


class InterruptedDrawing(Exception):  # noqa: N818 - nothing is wrong
    """The training was asked to end while a picture was drawn."""


def sample_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """The prompts that are drawn: those given, otherwise the first distinct captions, fewer in a short training; none without a report."""
    if not config.report:
        return []
    given = [line.strip() for line in config.sample_prompts.splitlines() if line.strip()]
    if len(config.tokens) == 1:
        given = [line.replace("<>", config.tokens[0]).replace("[trigger]", config.tokens[0]) for line in given]
    count = min(CAPTIONS, max(1, config.steps // STEPS_A_CAPTION))
    return list(dict.fromkeys(given)) or list(dict.fromkeys(captions))[:count]


def grid_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """The prompts of the grid: those of the samples and, where these are captions, the first one without its token.

    That one is left out of a training of few steps.
    """
    prompts = sample_prompts(config, captions)
    if prompts and config.tokens and not config.sample_prompts.strip() and config.steps >= STEPS_A_CAPTION:
        prompts.append(without_token(prompts[0], config.tokens, config.class_word))
    return list(dict.fromkeys(prompts))


@dataclass(frozen=True)
class Sampler:
    """Draws prompts as the weights are at the moment.

    `prompts` holds the ids of each prompt; in a training without tokens their embeddings are cached. `stopping` says whether
    the training was asked to end; then drawing ends too, with InterruptedDrawing. No random number of the training is used up.
    """

    base: BaseModel
    transformer: QwenImageTransformer2DModel
    prompt_embeds: PromptEncoder
    tokens: PlaceholderTokens
    prompts: dict[str, tuple[int, ...]]
    empty_ids: tuple[int, ...]
    side: int
    stopping: Callable[[], bool]

    @classmethod
    def side_of(cls, config: TrainConfig) -> int:
        """Width and height of the pictures: the smallest resolution that is trained, and no more than MAX_SIDE."""
        return min(MAX_SIDE, *config.resolution) // PIXELS_A_TOKEN * PIXELS_A_TOKEN

    @classmethod
    def noise_levels(cls, base: BaseModel, config: TrainConfig) -> Tensor:
        """The noise levels at which the transformer is asked for a picture, in its dtype, as QwenImagePipeline has them.

        In bf16 these are two for a step: the pipeline rounds timesteps to the latents' dtype before it divides them, and under CUDA's
        autocast guidance makes the latents fp32 (it takes norms, which are fp32 there).
        """
        scheduler, side = load_scheduler(base), cls.side_of(config) // PIXELS_A_TOKEN
        sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
        mu = shift_mu(side * side, *shift_constants(base))
        timesteps, _ = retrieve_timesteps(scheduler, sigmas=sigmas, mu=mu)
        return torch.cat([(timesteps.to(dtype) / 1000).to(base.dtype) for dtype in (base.dtype, torch.float32)])

    def draw(self, prompts: Sequence[str]) -> list[Image.Image]:
        """A picture of each prompt."""
        with self._pipeline() as pipeline:
            return [self._draw(pipeline, prompt) for prompt in prompts]

    def grid(self, initial_rows: Tensor) -> dict[str, list[Image.Image]]:
        """A picture of each prompt by the base model, with the LoRA and the rows as they were (R, D), and as trained; by these names.

        Where a prompt names no token, the rows make no difference and its picture is not drawn twice.
        """
        with self._pipeline() as pipeline:
            trained = [self._draw(pipeline, prompt) for prompt in self.prompts]
            with rows_as(self.tokens, initial_rows):
                reset = [
                    self._draw(pipeline, prompt) if self.tokens.contains(list(ids)) else picture
                    for (prompt, ids), picture in zip(self.prompts.items(), trained, strict=True)
                ]
                with without_lora(self.transformer):
                    base = [self._draw(pipeline, prompt) for prompt in self.prompts]
        return {BASE: base, ROW_RESET: reset, TRAINED: trained} if self.tokens.ids else {BASE: base, TRAINED_BASELINE: trained}

    @contextmanager
    def _pipeline(self) -> Iterator[QwenImagePipeline]:
        """The pipeline around the transformer; its VAE is in memory only meanwhile."""
        vae = load_vae(self.base, self.base.dtype)
        pipeline = QwenImagePipeline(load_scheduler(self.base), vae, None, None, self.transformer)
        del vae
        pipeline.set_progress_bar_config(disable=True)
        try:
            yield pipeline
        finally:
            pipeline.register_modules(vae=None, transformer=None)  # the caller may still hold the pipeline
            if self.transformer.device.type == "cuda":  # the VAE's modules refer to themselves: only the collector frees them
                free_memory()

    @torch.no_grad()
    def _draw(self, pipeline: QwenImagePipeline, prompt: str) -> Image.Image:
        def check(_pipeline, _index: int, _timestep, kept: dict) -> dict:
            if self.stopping():
                raise InterruptedDrawing
            return kept

        dtype, device = self.transformer.dtype, self.transformer.device
        embeds, negative = (self.prompt_embeds([ids]).to(dtype) for ids in (self.prompts[prompt], self.empty_ids))  # (1, T, D)
        # As in training: the LoRA's weights are in fp32.
        with torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else nullcontext():
            return pipeline(
                **pipeline_inputs(embeds, negative),
                true_cfg_scale=GUIDANCE,
                width=self.side,
                height=self.side,
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(SEED),
                callback_on_step_end=check,
            ).images[0]

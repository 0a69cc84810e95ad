"""Sample images of a training, made with the models that it has in memory: every n steps, and as a grid at its end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from placeholder.config import TrainConfig
from placeholder.data.captions import with_token, without_token
from placeholder.devices import free_memory, unreserved_bytes
from placeholder.lora.adapter import ADAPTER, without_lora
from placeholder.lora.gate import TokenGate, gated
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_scheduler, load_vae
from placeholder.tokens.prompt_encoder import pipeline_inputs
from placeholder.training.context import Training
from placeholder.training.diagnostics import rows_as

STEPS, GUIDANCE, SEED = 20, 4.0, 0  # the guidance of Qwen-Image's model card, fewer steps, and the same noise for every image
MAX_SIDE = 512  # pixels: at full size an image would cost about seven training steps (counted in FLOPs)
SAMPLE_BYTES = 3 * 10**9  # of Qwen-Image at MAX_SIDE: the VAE 0.25, decoding 0.9 (counted), and room for the passes (estimated)
CAPTIONS = 3  # how many captions of the data set are sampled where no prompts are given
STEPS_A_CAPTION = 300  # of training: sampling more captions would take a large part of a shorter training's time


class SamplingStopped(Exception):  # noqa: N818 - nothing is wrong
    """The training was asked to stop while an image was sampled."""


def sample_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """The prompts to sample: those given, otherwise the first distinct captions, fewer in a short training.

    None without a report.
    """
    if not config.report:
        return []
    given = [line.strip() for line in config.sample_prompts.splitlines() if line.strip()]
    if len(config.tokens) == 1:
        given = [with_token(line, config.tokens[0]) for line in given]
    count = min(CAPTIONS, max(1, config.steps // STEPS_A_CAPTION))
    return list(dict.fromkeys(given)) or list(dict.fromkeys(captions))[:count]


def grid_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """The prompts of the grid: the sample prompts and, where these are captions, the first one without its token.

    A training of fewer than STEPS_A_CAPTION steps leaves that one out.
    """
    prompts = sample_prompts(config, captions)
    if prompts and config.tokens and not config.sample_prompts.strip() and config.steps >= STEPS_A_CAPTION:
        prompts.append(without_token(prompts[0], config.tokens, config.class_word))
    return list(dict.fromkeys(prompts))


def sample_side(config: TrainConfig) -> int:
    """Width and height of a sample in pixels: the smallest resolution that is trained, at most MAX_SIDE."""
    unit = QWEN_IMAGE.pixels_per_token
    return min(MAX_SIDE, *config.resolution) // unit * unit


@dataclass(frozen=True)
class Sampler:
    """Samples prompts of `training.shown_prompts` with the weights as they are, `side` pixels wide and high.

    With `token_gate` the LoRA acts as in a prediction: in the passes whose prompt names a token.
    Uses no random numbers of the training. Raises SamplingStopped after a denoising step once `stopping` says so.
    """

    base: BaseModel
    training: Training
    side: int
    stopping: Callable[[], bool]
    token_gate: bool = True
    steps: int = STEPS

    def sample(self, prompts: Sequence[str]) -> list[Image]:
        """An image of each prompt."""
        with self._generator() as generate:
            return [generate(prompt) for prompt in prompts]

    def grid(self) -> dict[str, list[Image]]:
        """Columns by their titles, each with an image of every prompt: without and with what was trained.

        A prompt without a token does not depend on the token embeddings, and is not sampled twice.
        """
        training, prompts = self.training, self.training.shown_prompts
        tokens, transformer = training.tokens, training.state.transformer
        with self._generator() as generate:
            trained = [generate(prompt) for prompt in prompts]
            with rows_as(tokens, training.initial_rows):
                reset = [
                    generate(prompt) if tokens.contains(list(ids)) else image
                    for (prompt, ids), image in zip(prompts.items(), trained, strict=True)
                ]
                with without_lora(transformer):
                    base = [generate(prompt) for prompt in prompts]
        if not tokens.ids:
            return {"base model": base, "LoRA": trained}
        return {"base model": base, "LoRA, token reset": reset, "LoRA and token": trained}

    @contextmanager
    def _generator(self) -> Iterator[Callable[[str], Image]]:
        """Generates an image of a prompt, by the pipeline around the transformer; its VAE is in memory only meanwhile."""
        free_memory()
        if unreserved_bytes(self.base.device) < SAMPLE_BYTES:
            self.training.state.passes.release()
            free_memory()
        transformer = self.training.state.transformer
        pipeline = QWEN_IMAGE.pipeline(load_scheduler(self.base), load_vae(self.base, self.base.dtype), None, None, transformer)
        pipeline.set_progress_bar_config(disable=True)
        try:
            with gated(transformer) if self.token_gate and self.training.tokens.ids else nullcontext() as gate:
                yield partial(self._image, pipeline, gate)
        finally:
            pipeline.register_modules(vae=None, transformer=None)  # the caller may still hold the pipeline
            if transformer.device.type == "cuda":  # the VAE's modules refer to themselves: only the collector frees them
                free_memory()

    @torch.no_grad()
    def _image(self, pipeline: DiffusionPipeline, gate: TokenGate | None, prompt: str) -> Image:
        def check(_pipeline, _index: int, _timestep, kept: dict) -> dict:
            if self.stopping():
                raise SamplingStopped
            return kept

        training, transformer = self.training, self.training.state.transformer
        ids = (training.shown_prompts[prompt], training.state.sampler.empty_ids)
        embeds, negative = (training.prompt_embeds([row]).to(transformer.dtype) for row in ids)  # (1, T, D)
        if gate:
            for row, found in zip(ids, (embeds, negative), strict=True):
                gate.remember(found[0], () if training.tokens.contains(list(row)) else (ADAPTER,))
        half = transformer.dtype == torch.bfloat16  # autocast as in training: the LoRA's weights are fp32
        with torch.autocast(transformer.device.type, dtype=transformer.dtype) if half else nullcontext():
            return pipeline(
                **pipeline_inputs(embeds, negative),
                true_cfg_scale=GUIDANCE,
                width=self.side,
                height=self.side,
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(SEED),
                callback_on_step_end=check,
            ).images[0]

"""Cog's prediction interface: inputs and output, nothing else. The work is in placeholder/generate.py."""

import pathlib
from contextlib import ExitStack
from typing import Optional

from cog import BasePredictor, Input, Path, current_scope

from placeholder.generate import ImageGenerator, save_image
from placeholder.lora.distilled import load_fast_lora
from placeholder.model.base import BaseModel
from placeholder.model.download import local_file
from placeholder.request import image_request
from placeholder.service.files import OutputFolder

OUTPUT = OutputFolder("placeholder-prediction-")


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base model, the LoRA of go_fast, and the default weights (COG_WEIGHTS: a URL or a path)."""
        self.kept = ExitStack()  # a download lives as long as the process
        self.default_weights = self.kept.enter_context(local_file(str(weights))) if weights else None
        base = BaseModel.from_environment()
        self.generator = ImageGenerator(base, fast=load_fast_lora(base, print))
        if self.default_weights:
            self.generator.load(self.default_weights)

    def predict(
        self,
        prompt: str = Input(
            description="What to generate, with the placeholder token where the subject belongs, such as: a photo of <zwx>"
        ),
        negative_prompt: str = Input(default="", description="What to keep out of the image. Used when guidance is above 1."),
        steps: int = Input(default=50, ge=1, le=200, description="Denoising steps."),
        num_inference_steps: Optional[int] = Input(
            default=None, ge=1, le=200, description="Another name for steps; used instead of it where given."
        ),
        guidance: float = Input(
            default=4.0,
            ge=0.0,
            le=10.0,
            description="Classifier-free guidance scale. At 1 or below: no negative prompt, and a step takes half the time.",
        ),
        guidance_scale: Optional[float] = Input(
            default=None, ge=0.0, le=10.0, description="Another name for guidance; used instead of it where given."
        ),
        width: Optional[int] = Input(
            default=None, ge=64, le=2048, description="Width in pixels, rounded down to a multiple of 16. Give height too."
        ),
        height: Optional[int] = Input(
            default=None, ge=64, le=2048, description="Height in pixels, rounded down to a multiple of 16. Give width too."
        ),
        aspect_ratio: str = Input(
            default="16:9",
            choices=["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"],
            description="Aspect ratio of the image where width and height are not given.",
        ),
        image_size: str = Input(
            default="optimize_for_quality",
            choices=["optimize_for_quality", "optimize_for_speed"],
            description="Size where width and height are not given: about 1.6 megapixels for quality, 0.6 to 1 for speed.",
        ),
        seed: Optional[int] = Input(
            default=None, ge=-1, le=4294967295, description="Seed of the noise. Blank or -1: one is drawn and logged."
        ),
        lora_scale: float = Input(
            default=1.0,
            ge=-3.0,
            le=3.0,
            description="Strength of the trained LoRA. At 0 only the token embedding is left.",
        ),
        replicate_weights: Optional[Path] = Input(
            default=None,
            description="The weights.zip of a training, or another LoRA. Overrides the weights the model was started with.",
        ),
        extra_lora_weights: Optional[Path] = Input(
            default=None,
            description="A second weights.zip or LoRA, applied together with the first, with its own tokens.",
        ),
        extra_lora_scale: float = Input(
            default=1.0,
            ge=-3.0,
            le=3.0,
            description="Strength of the LoRA in extra_lora_weights.",
        ),
        extra_placeholder_token: Optional[str] = Input(
            default=None,
            description="Another name for the token of extra_lora_weights in the prompt, such as <second>, where both use one.",
        ),
        token_gate: bool = Input(
            default=True,
            description="Let a LoRA act only for prompts that name its token. Off: for every prompt, as in other tools.",
        ),
        enhance_prompt: bool = Input(
            default=False,
            description="Append the quality words of Qwen-Image's model card: Ultra HD, 4K, cinematic composition.",
        ),
        go_fast: bool = Input(
            default=False,
            description="Use a step-distilled LoRA: about 8 steps, no guidance. Where there is none: the first-block cache.",
        ),
        output_format: str = Input(default="webp", choices=["webp", "jpg", "png"], description="Format of the image file."),
        output_quality: int = Input(default=80, ge=0, le=100, description="Quality of webp and jpg files; png is lossless."),
    ) -> Path:
        """Generate one image."""
        inputs = dict(locals())
        del inputs["self"]
        weights, extra = inputs.pop("replicate_weights"), inputs.pop("extra_lora_weights")
        request = image_request(inputs)
        with OUTPUT.fresh() as folder:
            image = self.generator.generate(
                request,
                pathlib.Path(weights) if weights else self.default_weights,
                pathlib.Path(extra) if extra else None,
            )
            saved = save_image(image, request, folder)
            current_scope().record_metric("image_output_count", 1)
            return Path(saved)

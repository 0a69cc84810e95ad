"""The inputs of a prediction: declared once with default, range and help, and checked before any weights are touched."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from placeholder.options import (
    DRAWN,
    MAX_SEED,
    MAX_TEXT_CHARACTERS,
    TOKENS,
    Flag,
    Number,
    Text,
    Tokens,
    Whole,
    checked,
    option,
    options_class,
)

# The sizes of the hosted qwen/qwen-image-lora, in pixels, width first.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "optimize_for_quality": {
        "1:1": (1328, 1328),
        "16:9": (1664, 928),
        "9:16": (928, 1664),
        "4:3": (1472, 1136),
        "3:4": (1136, 1472),
        "3:2": (1536, 1024),
        "2:3": (1024, 1536),
    },
    "optimize_for_speed": {
        "1:1": (1024, 1024),
        "16:9": (1024, 576),
        "9:16": (576, 1024),
        "4:3": (1024, 768),
        "3:4": (768, 1024),
        "3:2": (1152, 768),
        "2:3": (768, 1152),
    },
}
OUTPUT_FORMATS = ("webp", "jpg", "png")
SIDE_MULTIPLE = 16  # pixels: the VAE's factor of 8, and latents packed 2x2
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_STEPS = 200
MAX_GUIDANCE, MAX_SCALE = 10.0, 3.0
# The suffix that Qwen-Image's model card appends to English prompts.
ENHANCEMENT = ", Ultra HD, 4K, cinematic composition."
# The headings of --help.
SAMPLING, WEIGHTS, SIZE, FILE = "sampling", "weights", "size", "file"


@options_class
class Request:
    """The inputs of `Predictor.predict`, with its names; `image_request` returns those that count."""

    prompt: Annotated[Text, option(SAMPLING)]
    """What to generate, with the placeholder token where the subject belongs, such as: a photo of <zwx>"""
    negative_prompt: Annotated[Text, option(SAMPLING)] = ""
    """What to keep out of the image. Used when guidance is above 1."""
    steps: Annotated[Whole, option(SAMPLING, ge=1, le=MAX_STEPS)] = 50
    """Denoising steps."""
    num_inference_steps: Annotated[Whole | None, option(SAMPLING, ge=1, le=MAX_STEPS)] = None
    """Another name for steps; used instead of it where given."""
    guidance: Annotated[Number, option(SAMPLING, ge=0.0, le=MAX_GUIDANCE)] = 4.0
    """Classifier-free guidance scale. At 1 or below: no negative prompt, and a step takes half the time."""
    guidance_scale: Annotated[Number | None, option(SAMPLING, ge=0.0, le=MAX_GUIDANCE)] = None
    """Another name for guidance; used instead of it where given."""
    width: Annotated[Whole | None, option(SIZE, ge=MIN_SIDE, le=MAX_SIDE)] = None
    """Width in pixels, rounded down to a multiple of 16. Give height too."""
    height: Annotated[Whole | None, option(SIZE, ge=MIN_SIDE, le=MAX_SIDE)] = None
    """Height in pixels, rounded down to a multiple of 16. Give width too."""
    aspect_ratio: Annotated[Literal[*SIZES["optimize_for_quality"]], option(SIZE)] = "16:9"
    """Aspect ratio of the image where width and height are not given."""
    image_size: Annotated[Literal[*SIZES], option(SIZE)] = "optimize_for_quality"
    """Size where width and height are not given: about 1.6 megapixels for quality, 0.6 to 1 for speed."""
    seed: Annotated[Whole | None, option(SAMPLING, ge=-1, le=MAX_SEED), DRAWN] = None
    """Seed of the noise. Blank or -1: one is drawn and logged."""
    lora_scale: Annotated[Number, option(WEIGHTS, ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0
    """Strength of the trained LoRA. At 0 only the token embedding is left."""
    replicate_weights: Annotated[Path | None, option(WEIGHTS)] = None
    """The weights.zip of a training, or another LoRA. Overrides the weights the model was started with."""
    extra_lora_weights: Annotated[Path | None, option(WEIGHTS)] = None
    """A second weights.zip or LoRA, applied together with the first, with its own tokens."""
    extra_lora_scale: Annotated[Number, option(WEIGHTS, ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0
    """Strength of the LoRA in extra_lora_weights."""
    extra_placeholder_token: Annotated[Tokens, option(WEIGHTS, accepts=TOKENS)] = ()
    """Another name for the token of extra_lora_weights in the prompt, such as <second>, where both use one."""
    token_gate: Annotated[Flag, option(WEIGHTS)] = True
    """Let a LoRA act only for prompts that name its token. Off: for every prompt, as in other tools."""
    enhance_prompt: Annotated[Flag, option(SAMPLING)] = False
    """Append the quality words of Qwen-Image's model card: Ultra HD, 4K, cinematic composition."""
    go_fast: Annotated[Flag, option(SAMPLING)] = False
    """Use a step-distilled LoRA: about 8 steps, no guidance. Where there is none: the first-block cache."""
    output_format: Annotated[Literal[*OUTPUT_FORMATS], option(FILE)] = "webp"
    """Format of the image file."""
    output_quality: Annotated[Whole, option(FILE, ge=0, le=100)] = 80
    """Quality of webp and jpg files; png is lossless."""


def image_request(inputs: dict[str, Any]) -> Request:
    """The request that the inputs of `Predictor.predict` ask for; those that are not given have their defaults.

    Raises ValueError, one sentence, for any value that is not accepted.
    """
    given = checked(Request, inputs)
    if not given.prompt.strip():
        raise ValueError("prompt is empty: describe the image, with the placeholder token where the subject belongs")
    width, height = _size(given)
    return replace(
        given,
        prompt=(given.prompt.rstrip(" .,") + ENHANCEMENT)[:MAX_TEXT_CHARACTERS] if given.enhance_prompt else given.prompt,
        steps=given.num_inference_steps or given.steps,
        guidance=given.guidance if given.guidance_scale is None else given.guidance_scale,
        width=width,
        height=height,
    )


def _size(given: Request) -> tuple[int, int]:
    """Width and height in pixels, rounded down to SIDE_MULTIPLE; from the aspect ratio where they are not given."""
    width, height = given.width, given.height
    if width is None and height is None:
        return SIZES[given.image_size][given.aspect_ratio]
    if width is None or height is None:
        raise ValueError(f"width is {width} and height is {height}: give both, or neither and an aspect_ratio")
    return width // SIDE_MULTIPLE * SIDE_MULTIPLE, height // SIDE_MULTIPLE * SIDE_MULTIPLE

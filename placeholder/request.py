"""What one picture is asked to be: every input of a prediction, validated before any weight is touched."""

from dataclasses import dataclass
from typing import Any

from placeholder.errors import MAX_SEED, choice, flag, number, text, whole

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
SIDE_MULTIPLE = 16  # latents.PIXELS_A_TOKEN, without loading torch for it
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_STEPS = 200
# The suffix that Qwen-Image's model card appends to English prompts.
ENHANCEMENT = ", Ultra HD, 4K, cinematic composition."


@dataclass(frozen=True)
class Request:
    """One picture: prompts, guidance and steps, its size in pixels, its seed, the LoRAs' strengths, and the file to write."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    width: int
    height: int
    seed: int | None
    lora_scale: float
    go_fast: bool
    output_format: str
    output_quality: int
    extra_lora_scale: float = 1.0


def image_request(inputs: dict[str, Any]) -> Request:
    """The request that the inputs of `Predictor.predict` ask for; `num_inference_steps` and `guidance_scale` are aliases.

    Raises ValueError, one sentence, for any value that is not accepted.
    """
    prompt = text("prompt", inputs["prompt"])
    if not prompt.strip():
        raise ValueError("prompt is empty: describe the picture, with the placeholder token where the subject belongs")
    if flag("enhance_prompt", inputs["enhance_prompt"]):
        prompt = prompt.rstrip(" .,") + ENHANCEMENT
    width, height = _size(inputs)
    seed = inputs["seed"]
    return Request(
        prompt=prompt,
        negative_prompt=text("negative_prompt", inputs["negative_prompt"]),
        steps=whole("steps", _alias(inputs, "steps", "num_inference_steps"), 1, MAX_STEPS),
        guidance=number("guidance", _alias(inputs, "guidance", "guidance_scale"), 0.0, 10.0),
        width=width,
        height=height,
        seed=None if seed is None else whole("seed", seed, 0, MAX_SEED),
        lora_scale=number("lora_scale", inputs["lora_scale"], 0.0, 3.0),
        extra_lora_scale=number("extra_lora_scale", inputs["extra_lora_scale"], 0.0, 3.0),
        go_fast=flag("go_fast", inputs["go_fast"]),
        output_format=choice("output_format", inputs["output_format"], OUTPUT_FORMATS),
        output_quality=whole("output_quality", inputs["output_quality"], 0, 100),
    )


def _size(inputs: dict[str, Any]) -> tuple[int, int]:
    """Width and height in pixels, rounded down to what the model can draw; from the aspect ratio where they are not given."""
    width, height = inputs["width"], inputs["height"]
    if width is None and height is None:
        sizes = SIZES[choice("image_size", inputs["image_size"], tuple(SIZES))]
        return sizes[choice("aspect_ratio", inputs["aspect_ratio"], tuple(sizes))]
    if width is None or height is None:
        raise ValueError(f"width is {width} and height is {height}: give both, or neither and an aspect_ratio")
    sides = (whole(name, inputs[name], MIN_SIDE, MAX_SIDE) for name in ("width", "height"))
    width, height = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in sides)
    return width, height


def _alias(inputs: dict[str, Any], name: str, alias: str) -> Any:
    return inputs[name] if inputs[alias] is None else inputs[alias]

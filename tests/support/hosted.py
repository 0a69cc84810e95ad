"""What the hosted qwen/qwen-image-lora and its trainer take, and the requests that their documents show.

The inputs are those of the hosted model's API page; the requests stand in the README and README_ZERO_PRIOR.md of
github.com/replicate/qwen-image-lora-trainer. Files, which the requests name as they please, are left out.
"""

from typing import Any

# An input: its type, its default, and its range or its choices.
Declared = tuple[str, Any, tuple | list | None]
TRAIN_INPUTS: dict[str, Declared] = {
    "dataset": ("Path", None, None),
    "steps": ("int", 1000, (100, 6000)),
    "learning_rate": ("float", 2e-4, (1e-5, 1e-3)),
    "lora_rank": ("int", 64, (8, 128)),
    "default_caption": ("str", "A photo of a person named <>", None),
    "batch_size": ("int", 1, [1, 2, 4]),
    "optimizer": ("str", "adamw", ["adamw8bit", "adamw", "adam8bit", "prodigy"]),
    "seed": ("int", None, None),
}
PREDICT_INPUTS: dict[str, Declared] = {
    "prompt": ("str", None, None),
    "enhance_prompt": ("bool", False, None),
    "negative_prompt": ("str", "", None),
    "aspect_ratio": ("str", "16:9", ["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"]),
    "image_size": ("str", "optimize_for_quality", ["optimize_for_quality", "optimize_for_speed"]),
    "width": ("int", None, (512, 2048)),
    "height": ("int", None, (512, 2048)),
    "go_fast": ("bool", False, None),
    "num_inference_steps": ("int", 50, (1, 50)),
    "guidance": ("float", 4.0, (0, 10)),
    "seed": ("int", None, None),
    "output_format": ("str", "webp", ["webp", "jpg", "png"]),
    "output_quality": ("int", 80, (0, 100)),
    "replicate_weights": ("Path", None, None),
    "lora_scale": ("float", 1.0, (0, 3)),
}
# Where a default of ours is another: our rank is 32, and lora_rank only counts where it is given.
OTHER_DEFAULTS = {"lora_rank": None}
SIZES = {
    ("optimize_for_quality", "1:1"): (1328, 1328),
    ("optimize_for_quality", "16:9"): (1664, 928),
    ("optimize_for_quality", "9:16"): (928, 1664),
    ("optimize_for_quality", "4:3"): (1472, 1136),
    ("optimize_for_quality", "3:4"): (1136, 1472),
    ("optimize_for_quality", "3:2"): (1536, 1024),
    ("optimize_for_quality", "2:3"): (1024, 1536),
    ("optimize_for_speed", "1:1"): (1024, 1024),
    ("optimize_for_speed", "16:9"): (1024, 576),
    ("optimize_for_speed", "9:16"): (576, 1024),
    ("optimize_for_speed", "4:3"): (1024, 768),
    ("optimize_for_speed", "3:4"): (768, 1024),
    ("optimize_for_speed", "3:2"): (1152, 768),
    ("optimize_for_speed", "2:3"): (768, 1152),
}

TRAININGS: dict[str, dict[str, Any]] = {
    "a person": {"default_caption": "A photo of a person named <>"},
    "anything": {"default_caption": "A photo of <>"},
    "a token": {"rank": 32, "train_placeholder_token": True, "placeholder_token": "<zwx>", "steps": 4000},
    "a token, basic": {"placeholder_token": "<zwx>", "rank": 64, "steps": 2000},
}
PREDICTIONS: dict[str, dict[str, Any]] = {
    "sunset": {"prompt": "A beautiful sunset"},
    "portrait": {"prompt": "Studio portrait of <>, cinematic lighting", "output_format": "webp"},
    "a token": {"prompt": "a photo of <zwx>", "steps": 20, "guidance": 4, "width": 1024, "height": 1024, "lora_scale": 1.0},
    "a token, golden hour": {
        "prompt": "a portrait of <zwx> in golden hour light",
        "negative_prompt": "blurry, low quality",
        "steps": 25,
        "guidance_scale": 4.5,
        "lora_scale": 1.2,
    },
}


def defaults(inputs: dict[str, Declared]) -> dict[str, Any]:
    """A request that gives every input that has a default."""
    return {name: default for name, (_, default, _) in inputs.items() if default is not None}

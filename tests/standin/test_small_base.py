"""The small stand-in for Qwen-Image: the real vocabulary, the same classes, and the same weights from the same seed."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from placeholder.model.loading import load_scheduler
from standin import judge
from standin.check_base import held_out_scenes, right_shares, sample_all
from standin.small_base import ADDED_TOKENS, build_tiny_base
from standin.world import RARE_WORD, TRIGGER, Scene, Thing, render
from study.subjects import SUBJECTS


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_added_tokens_stand_behind_the_vocabulary_as_in_the_checkpoint(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([token for token, _ in ADDED_TOKENS])
    assert ids == list(range(151643, 151665))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 151645
    assert tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert tokenizer.decode([9707, 11, 1879, 0]) == "Hello, world!"


def test_it_has_the_classes_and_the_schedule_of_qwen_image(base):
    index = json.loads(Path(base.source, "model_index.json").read_text())
    assert {name: entry[1] for name, entry in index.items() if isinstance(entry, list)} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    scheduler = load_scheduler(base).config
    assert (scheduler.base_shift, scheduler.max_shift, scheduler.shift_terminal) == (0.5, 0.9, 0.02)
    assert (scheduler.base_image_seq_len, scheduler.max_image_seq_len) == (256, 8192)
    assert scheduler.use_dynamic_shifting


def test_the_seed_decides_the_weights_and_a_folder_is_built_once(tmp_path):
    torch.manual_seed(99)
    first = build_tiny_base(tmp_path / "first", seed=0)
    torch.manual_seed(1)
    again = build_tiny_base(tmp_path / "again", seed=0)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    (first / "marker").touch()
    assert build_tiny_base(first) == first
    assert (first / "marker").exists()
    assert {folder.name for folder in tmp_path.iterdir()} == {"first", "again"}


def test_the_trained_base_shows_what_held_out_captions_ask_for():
    scenes = held_out_scenes(16, seed=11)
    shares = right_shares(sample_all(scenes), scenes)
    assert shares["background"] >= 0.95 and shares["color"] >= 0.95 and shares["shape"] >= 0.8, shares


def test_the_classifier_knows_worn_renders_and_takes_no_gray_square_for_an_arrow_and_no_mosaic_for_a_waffle():
    pixels, labels = judge.examples(300, random.Random(9))
    kinds = [judge.kind_of(Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())) for image in pixels]
    right = [kind == judge.KINDS[label] for kind, label in zip(kinds, labels, strict=True)]
    assert sum(right) > 0.9 * len(right)
    square = render(Scene((Thing("square", "white"),), "blue", seed=3))
    gray = Image.fromarray(np.where(np.asarray(square).min(2, keepdims=True) > 200, np.uint8(128), np.asarray(square)))
    style = SUBJECTS["style"]
    found = judge.kind_probabilities([gray, *(style.image(context, 1000) for context in style.seen)])
    assert max(found[TRIGGER] + found[RARE_WORD]) < 0.5

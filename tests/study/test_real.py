"""The study on a user's photographs, from the command to its table: the tiny base model, small random CLIP and DINO."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from placeholder.model.base import MODEL_VARIABLE
from standin.subject import SEEN_BACKGROUNDS
from study import real
from study.image_metrics import ImageMetrics
from study.subjects import SUBJECTS

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a CLIP and a DINO of the published classes, not trained."""
    folder = tmp_path_factory.mktemp("metrics")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(chr(code) for code in range(97, 123)),
        *(f"{chr(c)}</w>" for c in range(97, 123)),
    ]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    text, vision = SMALL | {"vocab_size": len(words), "eos_token_id": 1}, SMALL | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(size=SIZE, crop_size=SIZE), tokenizer).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**vision)).save_pretrained(folder / "dino")
    ViTImageProcessor(size=SIZE).save_pretrained(folder / "dino")
    return {name: str(folder / name) for name in ("clip", "dino")}


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for context in SUBJECTS["object"].seen[:3]:
        SUBJECTS["object"].image(context, seed=1).save(folder / f"{context.background}.png")
        (folder / f"{context.background}.txt").write_text(f"a photo of a <> house on a {context.background} background")
    return folder


def test_an_image_is_nearest_to_itself_and_embeddings_have_length_one(models):
    metrics = ImageMetrics(torch.device("cpu"), **models)
    images = [Image.new("RGB", (48, 32), name) for name in SEEN_BACKGROUNDS]
    for found in (metrics.clip_images(images), metrics.dino_images(images)):
        assert torch.allclose(found.norm(dim=1), torch.ones(6)) and (found @ found.T).argmax(1).tolist() == list(range(6))
    texts = metrics.clip_texts(["a house", "a house", "fish"])
    assert torch.allclose(texts[0], texts[1]) and not torch.allclose(texts[0], texts[2])


def test_the_command_writes_the_table_with_every_arm_that_was_asked_for(models, photographs, base, tmp_path, monkeypatch):
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    monkeypatch.setattr(real, "PLACES", real.PLACES[:2])
    monkeypatch.setattr(real, "UNRELATED", real.UNRELATED[:1])
    output, arms = tmp_path / "output", ["TOK, preservation", "token"]
    options = ["--class-word", "house", "--arms", *arms, "--seeds", "1", "--samples", "1", "--steps", "4", "--rank", "2"]
    options += ["--learning-rate", "0.01", "--resolution", "64", "--output", str(output)]
    real.main([str(photographs), *options, "--clip", models["clip"], "--dino", models["dino"]])
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == arms
    drawn = runs[1]["drawn"]
    assert drawn["gated"]["class_change"] == drawn["gated"]["drift"] == 0.0 < drawn["always"]["class_change"]
    assert list(drawn["gated"]["prior_leakage_by_step"]) == ["1", "2", "3", "4"]
    lines = (output / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * len(arms) and lines[0].startswith(
        "| trained | LoRA acts | seconds of training | CLIP-I | DINO |"
    )


def test_a_caption_must_say_where_the_subjects_name_belongs(models, photographs):
    (photographs / "blue.txt").write_text("a photo of a house")
    with pytest.raises(ValueError, match="the caption of blue.png has no <>: write it where the subject's name belongs"):
        real.read_photographs(photographs, "house", 64, ImageMetrics(torch.device("cpu"), **models))

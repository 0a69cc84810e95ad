"""Captions for a data set's images: what the model is asked, by which crop, and how several processes share the work."""

import pytest
import torch
from PIL import Image

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.data import captions
from placeholder.data.captions import describe_photos, instruction
from placeholder.data.dataset import read_dataset
from placeholder.distributed import Processes
from placeholder.model.captioner import describe, load_vlm
from tests.support.samples import write_dataset

TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}


@pytest.fixture(scope="module")
def vlm(vision_base):
    return load_vlm(vision_base)


def test_the_model_is_asked_for_what_varies_and_to_call_the_subject_by_its_token():
    assert "zwx" not in instruction(TrainConfig())
    assert instruction(TrainConfig(placeholder_token=("<zwx>",))) == instruction(TrainConfig())
    text = instruction(TrainConfig(**TOKEN, class_word=" young\ndog {x}"))
    assert "Its main subject, a young dog {x}, is called <zwx>: write <zwx>" in text
    assert "say nothing of what <zwx> itself looks like" in text
    assert "Its main subject is called <zwx>" in instruction(TrainConfig(**TOKEN))
    two = TOKEN | {"placeholder_token": ("<a>", "<b>")}
    assert "is called <b>" in instruction(TrainConfig(**two, autocaption_suffix="with <b>"))


def test_the_documentation_quotes_what_the_model_is_asked():
    text = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8").replace("\n> ", " ")
    assert captions.INSTRUCTION in text
    assert captions.SUBJECT_INSTRUCTION in text


def test_each_image_gets_its_own_description_by_its_largest_crop(vlm, tokenizer, tmp_path):
    photos, _ = read_dataset(write_dataset(tmp_path / "data.zip", [None] * 3), (32, 64))
    log: list[str] = []
    found = describe_photos(vlm, tokenizer, photos, TrainConfig(), Processes(), log.append)
    text = instruction(TrainConfig())
    crops = [max(photo.crops, key=torch.Tensor.numel) for photo in photos]
    assert [tuple(crop.shape[1:]) for crop in crops] == [(64, 64), (48, 80), (64, 64)]
    images = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in crops]
    assert found == [describe(vlm, tokenizer, image, text) for image in images]
    assert len(set(found)) == 3
    described = [f"Autocaption: {number} of 3 images described" for number in (1, 2, 3)]
    assert log == [f"Autocaption: 3 images are described; the instruction: {text}", *described]


def test_several_processes_share_the_images_and_have_all_descriptions(monkeypatch):
    monkeypatch.setattr(captions, "describe", lambda vlm, tokenizer, image, text: f"gray {image.getpixel((0, 0))[0]}")
    photos = [captions.Photo(f"{gray}.png", None, (torch.full((3, 16, 16), gray, dtype=torch.uint8),)) for gray in range(3)]
    shares = [Part(2, index) for index in range(2)]
    for share in shares:
        describe_photos(None, None, photos, TrainConfig(), share, lambda line: None)
    assert [len(share.brought) for share in shares] == [2, 1]
    shares[0].others.extend(shares[1].brought)
    found = describe_photos(None, None, photos, TrainConfig(), shares[0], lambda line: None)
    assert found == ["gray 0", "gray 1", "gray 2"]


class Part(Processes):
    """One of several processes: what it brings is kept, and what the `others` bring can be given."""

    def all_gather(self, part):
        vars(self).setdefault("others", [])
        object.__setattr__(self, "brought", part)
        return part + self.others

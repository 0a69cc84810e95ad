"""Captions by the base model: the instruction, and the work shared by processes."""

from dataclasses import dataclass, field, replace

import pytest
from PIL import Image

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.data import autocaption
from placeholder.data.autocaption import check_autocaption, describe_photos, draft, instruction
from placeholder.data.captions import trained_captions
from placeholder.data.dataset import Photo, read_dataset
from placeholder.distributed import Processes
from tests.support.samples import write_dataset

TOKEN = TrainConfig(train_placeholder_token=True, placeholder_token=("<zwx>",))
TWO = replace(TOKEN, placeholder_token=("<a>", "<b>"), autocaption=True)


def test_of_several_tokens_prefix_or_suffix_has_to_name_one():
    sentence = "autocaption cannot tell which of <a>, <b> an image shows: name one in autocaption_prefix or autocaption_suffix"
    with pytest.raises(ValueError, match=sentence):
        check_autocaption(TWO)
    named = replace(TWO, autocaption_suffix="<b>")
    assert "<b>" in draft(named) and "<a>" not in draft(named)  # or a token that no caption names would be found late
    check_autocaption(named)
    photos = [Photo("0.png", None, ()), Photo("1.png", "<a> runs", ())]
    assert [caption.text for caption in trained_captions(photos, named, lambda line: None, ["It sits."])] == [
        "It sits. <b>",
        "<a> runs",
    ]


def test_the_instruction_asks_for_what_varies_and_calls_the_subject_by_its_token():
    assert "zwx" not in instruction(TrainConfig())
    assert instruction(TrainConfig(placeholder_token=("<zwx>",))) == instruction(TrainConfig())
    text = instruction(replace(TOKEN, class_word=" young\ndog {x}"))
    assert "Its main subject, a young dog {x}, is called <zwx>: write <zwx>" in text
    assert "say nothing of what <zwx> itself looks like" in text
    assert "Its main subject is called <zwx>" in instruction(TOKEN)
    assert "is called <b>" in instruction(replace(TWO, autocaption_suffix="with <b>"))


def test_the_documentation_quotes_the_instruction():
    text = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8").replace("\n> ", " ")
    assert autocaption.INSTRUCTION in text
    assert autocaption.SUBJECT_INSTRUCTION in text


@dataclass(frozen=True)
class OneOfTwo(Processes):
    """One of two processes, without the other; keeps the part that it gathers."""

    world_size: int = 2
    gathered: list = field(default_factory=list)

    def all_gather(self, part):
        self.gathered.extend(part)
        return part


def test_each_image_is_described_by_its_largest_crop_and_processes_share_the_work(tmp_path):
    photos, _ = read_dataset(write_dataset(tmp_path / "data.zip", [None] * 3), (32, 64))
    log: list[str] = []

    def describe(_vlm, _tokenizer, image: Image.Image, text: str) -> str:
        assert text == instruction(TOKEN)
        return f"{image.size} {image.getpixel((0, 0))}"

    found = describe_photos(None, None, photos, TOKEN, Processes(), log.append, describe)
    assert [words.split(") ")[0] for words in found] == ["(64, 64", "(80, 48", "(64, 64"]
    assert len(set(found)) == 3
    assert log[0] == f"Autocaption: 3 images are described; the instruction: {instruction(TOKEN)}"
    assert log[1:] == [f"Autocaption: {number} of 3 images described" for number in (1, 2, 3)]
    processes = [OneOfTwo(rank=rank) for rank in range(2)]
    for each in processes:
        describe_photos(None, None, photos, TOKEN, each, log.append, describe)
    assert [len(each.gathered) for each in processes] == [2, 1]
    assert [words for _, words in sorted(processes[1].gathered + processes[0].gathered)] == found

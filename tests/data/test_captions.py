"""Captions as text: the token in its place, what is preserved, descriptions by autocaption, and captions as files."""

from dataclasses import dataclass, field, replace

import pytest
from PIL import Image

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.data import captions as captions_module
from placeholder.data.captions import (
    Caption,
    caption_files,
    check_autocaption,
    describe_photos,
    instruction,
    place_token,
    preserved_prompts,
    trained_captions,
    without_token,
)
from placeholder.data.dataset import Photo, read_dataset
from placeholder.distributed import Processes
from tests.support.samples import write_dataset

TOKEN = TrainConfig(train_placeholder_token=True, placeholder_token=("<zwx>",))
AUTO = replace(TOKEN, autocaption=True, autocaption_prefix="a photo of [trigger], ", autocaption_suffix=" 35mm")
TWO = replace(TOKEN, placeholder_token=("<a>", "<b>"), autocaption=True)


@pytest.mark.parametrize(
    ("caption", "placed", "in_front"),
    [
        ("a photo of <zwx>", "a photo of <zwx>", False),
        ("a photo of <>", "a photo of <zwx>", False),
        ("<> and [trigger] and <zwx>", "<zwx> and <zwx> and <zwx>", False),
        ("a photo of a cat", "<zwx> a photo of a cat", True),
        ("<ZWX> in capitals", "<zwx> <ZWX> in capitals", True),
        ("", "<zwx>", True),
    ],
)
def test_a_caption_gets_the_token_in_its_place_or_in_front(caption, placed, in_front):
    assert place_token(caption, ("<zwx>",), "a.png") == (placed, in_front)


def test_with_several_tokens_a_caption_has_to_name_one_itself():
    several = ("<zwx>", "<qrs>")
    assert place_token("<qrs> with <>", several, "a.png") == ("<qrs> with <>", False)
    sentence = r"the caption of a\.png names none of <zwx>, <qrs>: with several tokens each caption says"
    with pytest.raises(ValueError, match=sentence):
        place_token("a photo of <>", several, "a.png")


@pytest.mark.parametrize(
    ("caption", "class_word", "plain"),
    [
        ("a photo of a <zwx> dog", "", "a photo of a dog"),
        ("a photo of <zwx>", "person", "a photo of person"),
        ("<zwx> and <qrs> in a garden", "", "and in a garden"),
        ("a garden", "dog", "a garden"),
    ],
)
def test_a_caption_without_its_token_has_the_class_word_instead(caption, class_word, plain):
    assert without_token(caption, ("<zwx>", "<qrs>"), class_word) == plain


def test_preserved_prompts_are_the_caption_without_the_token_and_the_empty_one():
    log: list[str] = []
    found = preserved_prompts(["a <zwx> in a garden"], replace(TOKEN, class_word="dog"), log.append)
    assert found == [("a dog in a garden", "")]
    assert log == ["Prior preservation: prompts such as 'a dog in a garden' keep what the base model generates for them"]
    for config in (TrainConfig(), replace(TOKEN, prior_preservation=0.0)):
        assert preserved_prompts(["one", "two"], config, log.append) == [(), ()]
    assert len(log) == 1


def described(config: TrainConfig, *descriptions: str) -> tuple[list[Caption], list[str]]:
    """The captions of images without any, and the log."""
    log: list[str] = []
    photos = [Photo(f"{number}.png", None, (), file=f"{number}.png") for number in range(len(descriptions))]
    return trained_captions(photos, config, log.append, descriptions), log


def test_a_description_without_the_token_gets_it_in_front():
    captions, log = described(replace(AUTO, autocaption_prefix=None), "It sits.", "A <zwx> sits.", "Here [trigger] sits.")
    assert [caption.text for caption in captions] == ["<zwx> It sits. 35mm", "A <zwx> sits. 35mm", "Here <zwx> sits. 35mm"]
    assert log[0] == "Captions: 1 of 3 lacked the token and got it in front"
    assert log[2] == "Caption of 1.png (auto): A <zwx> sits. 35mm"


def test_in_the_baseline_captions_are_taken_literally():
    (caption,), log = described(replace(AUTO, train_placeholder_token=False), "It sits.")
    assert caption.text == "a photo of [trigger], It sits. 35mm"
    assert log == [f"Caption of 0.png (auto): {caption.text}"]


def test_an_empty_description_leaves_prefix_and_suffix_or_else_the_default():
    captions, _ = described(AUTO, "")
    assert captions[0][1:3] == ("a photo of <zwx>, 35mm", "auto")
    captions, log = described(replace(AUTO, autocaption_prefix=None, autocaption_suffix=None), "", "It sits.")
    assert captions[0][1:3] == ("A photo of a person named <zwx>", "default")
    assert captions[1][1:3] == ("<zwx> It sits.", "auto")
    assert "Caption of 0.png (default): A photo of a person named <zwx>" in log


def test_of_several_tokens_prefix_or_suffix_has_to_name_one():
    sentence = "autocaption cannot tell which of <a>, <b> an image shows: name one in autocaption_prefix or autocaption_suffix"
    with pytest.raises(ValueError, match=sentence):
        check_autocaption(TWO)
    named = replace(TWO, autocaption_suffix="<b>")
    check_autocaption(named)
    (caption,), _ = described(named, "It sits.")
    assert caption.text == "It sits. <b>"


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
    assert captions_module.INSTRUCTION in text
    assert captions_module.SUBJECT_INSTRUCTION in text


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


def test_caption_files_have_the_images_names_where_these_are_valid():
    files = ("a.png", "A.jpg", "x/é.webp", "bad\x07.png", "n" * 200 + ".png", "b.c.png")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert list(found) == ["a.txt", "picture-00002.txt", "x/é.txt", "picture-00004.txt", "picture-00005.txt", "b.c.txt"]
    assert found["x/é.txt"] == b"caption 2\n"


def test_a_caption_file_by_number_takes_no_other_images_place():
    files = ("a.jpg", "a.png", "picture-00002.jpg")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert found == {"a.txt": b"caption 0\n", "picture-00002-.txt": b"caption 1\n", "picture-00002.txt": b"caption 2\n"}

"""Captions as text: the token in its place, spellings that are none, what is preserved, and captions as files."""

from dataclasses import replace

import pytest

from placeholder.config import TrainConfig
from placeholder.data.captions import (
    Caption,
    caption_files,
    place_token,
    plain_text_warnings,
    preserved_prompts,
    trained_captions,
    without_token,
)
from placeholder.data.dataset import Photo, read_dataset
from tests.support.samples import encoded, picture, write_zip

TOKEN = TrainConfig(train_placeholder_token=True, placeholder_token=("<zwx>",), prior_preservation=4.0)
AUTO = replace(TOKEN, autocaption=True, autocaption_prefix="a photo of [trigger], ", autocaption_suffix=" 35mm")


@pytest.mark.parametrize(
    ("caption", "placed", "in_front"),
    [
        ("a photo of <zwx>", "a photo of <zwx>", False),
        ("a photo of <>", "a photo of <zwx>", False),
        ("<> and [trigger] and <zwx>", "<zwx> and <zwx> and <zwx>", False),
        ("a [TRIGGER] dog beside [Name]", "a <zwx> dog beside <zwx>", False),
        ("a photo of a cat", "<zwx> a photo of a cat", True),
        ("<ZWX> in capitals", "<zwx> <ZWX> in capitals", True),
        ("", "<zwx>", True),
    ],
)
def test_a_caption_gets_the_token_in_its_place_or_in_front(caption, placed, in_front):
    assert place_token(caption, ("<zwx>",), "a.png") == (placed, in_front)


def test_the_default_caption_of_a_person_is_a_warning_and_any_other_is_not():
    photos = [Photo("a.png", None, ()), Photo("b.png", "a photo of <>", ())]
    for config, text in ((TOKEN, "A photo of a person named <zwx>"), (TrainConfig(), "A photo of a person")):
        log: list[str] = []
        trained_captions(photos, config, log.append)
        (found,) = (line for line in log if "no caption" in line)
        assert found.startswith(f"Warning: 1 of 2 images have no caption and are trained as '{text}': if")
        log.clear()
        trained_captions(photos, replace(config, default_caption="a dog"), log.append)
        trained_captions(photos[1:], config, log.append)
        assert not [line for line in log if "no caption" in line]


def test_of_several_tokens_each_is_named_in_some_caption():
    config = TrainConfig(train_placeholder_token=True, placeholder_token=("<zwx>", "<qrs>"))
    photos = [Photo("a.png", "<zwx> here", ()), Photo("b.png", "a <zwx>", ())]
    with pytest.raises(ValueError, match="no caption names <qrs>: write each token into the captions of its images"):
        trained_captions(photos, config, print)


def test_the_default_caption_is_made_one_line_like_all_others():
    config = TrainConfig(default_caption="a photo\n of <>\n", train_placeholder_token=True, placeholder_token=("<zwx>",))
    (caption,) = trained_captions([Photo("a.png", None, ())], config, print)
    assert caption.text == "a photo of <zwx>"


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


@pytest.mark.parametrize(
    ("config", "captions", "found"),
    [
        (TOKEN, ["a <zwx> dog", "<zwx>", "a zwxy dog"], []),
        (TOKEN, ["a <ZWX>", "a zwx dog", "the Zwx", "one more zwx"], [("<ZWX>", 1), ("Zwx", 1), ("zwx", 2)]),
        (TOKEN, ["<zwx> and zwx, zwx", "<qrs>"], [("<qrs>", 1), ("zwx", 1)]),
        (replace(TOKEN, placeholder_token=("<dog>",), class_word="dog"), ["a <dog> dog"], []),
        (replace(TOKEN, placeholder_token=("zwx",)), ["a zwx", "a ZWX"], [("ZWX", 1)]),
        (replace(TOKEN, placeholder_token=("<a>", "<b>")), ["<a> and [name]"], [("[name]", 1)]),
        (TrainConfig(), ["a <>", "[Trigger] dog", "zwx", "a cat"], [("<>", 1), ("[Trigger]", 1), ("zwx", 1)]),
        (replace(TOKEN, train_placeholder_token=False), ["a photo of <zwx>"] * 2, [("<zwx>", 2)]),
    ],
)
def test_what_only_looks_like_the_token_gets_a_warning_with_its_count(config, captions, found):
    given = [Caption(f"{number}.png", text, "file") for number, text in enumerate(captions)]
    warnings = plain_text_warnings(given, config)
    assert [warning.split(" captions, such as ")[0] for warning in warnings] == [
        f"Warning: {sign!r} is plain text in {count} of {len(captions)}" for sign, count in found
    ]


def test_a_warning_of_plain_text_has_an_example_and_says_what_to_do():
    warning = "Warning: '<ZWX>' is plain text in 1 of 1 captions, such as that of a.png: 'a photo of <ZWX>'; "
    given = [Caption("a.png", "a photo of <ZWX>", "file")]
    assert plain_text_warnings(given, TOKEN) == [warning + "write <zwx> where the subject is meant"]
    assert plain_text_warnings(given, TrainConfig()) == [warning + "no token is trained"]


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
    assert log[0].startswith("Warning: '[trigger]' is plain text in 1 of 1 captions, such as that of 0.png: ")
    assert log[1:] == [f"Caption of 0.png (auto): {caption.text}"]


def test_an_empty_description_leaves_prefix_and_suffix_or_else_the_default():
    captions, _ = described(AUTO, "")
    assert captions[0][1:3] == ("a photo of <zwx>, 35mm", "auto")
    captions, log = described(replace(AUTO, autocaption_prefix=None, autocaption_suffix=None), "", "It sits.")
    assert captions[0][1:3] == ("A photo of a person named <zwx>", "default")
    assert captions[1][1:3] == ("<zwx> It sits.", "auto")
    assert "Caption of 0.png (default): A photo of a person named <zwx>" in log


def test_caption_files_have_the_images_names_where_these_are_valid():
    files = ("a.png", "x/é.webp", "bad\x07.png", "n" * 200 + ".png", "b.c.png")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert list(found) == ["a.txt", "x/é.txt", "picture-00003.txt", "picture-00004.txt", "b.c.txt"]
    assert found["x/é.txt"] == b"caption 1\n"


def test_a_caption_file_by_number_takes_no_other_images_place():
    files = ("picture-00002.jpg", "bad\x07.png", "a.jpg", "a.png", "a.jpg.png", "é.jpg", "e\u0301.JPG")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    numbered = [f"picture-0000{number}.txt" for number in ("2", "2-", "3", "5", "6", "7")]
    assert list(found) == [*numbered[:3], "a.png.txt", *numbered[3:]]
    assert list(found.values()) == [b"caption %d\n" % number for number in range(len(files))]


def test_caption_files_of_images_that_differ_in_suffix_or_case_come_back_to_their_own_images(tmp_path):
    files = ("a.jpg", "a.png", "B.jpg", "b.png")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert list(found) == ["a.jpg.txt", "a.png.txt", "B.jpg.txt", "b.png.txt"]
    images = {name: encoded(picture()) for name in files}
    photos, _ = read_dataset(write_zip(tmp_path / "d.zip", images | found), (64,))
    assert {photo.file: photo.caption for photo in photos} == {file: f"caption {n}" for n, file in enumerate(files)}

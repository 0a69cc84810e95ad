"""The inputs of a prediction into one validated request."""

import pytest

from placeholder.options import options_of
from placeholder.request import Request, image_request

DEFAULTS = {name: option.default for name, option in options_of(Request).items()} | {"prompt": "a photo of <zwx>"}


def request(**inputs):
    return image_request(DEFAULTS | inputs)


def test_the_defaults_make_a_request():
    found = request()
    assert found == image_request({"prompt": "a photo of <zwx>"})
    assert (found.prompt, found.negative_prompt) == ("a photo of <zwx>", "")
    assert (found.steps, found.guidance, found.lora_scale, found.seed) == (50, 4.0, 1.0, None)
    assert (found.width, found.height) == (1664, 928)
    assert (found.output_format, found.output_quality, found.go_fast) == ("webp", 80, False)


@pytest.mark.parametrize(("given", "drawn"), [(64, 64), (79, 64), (80, 80), (1000, 992), (2048, 2048)])
def test_width_and_height_override_the_aspect_ratio_and_are_rounded_to_sixteens(given, drawn):
    found = request(width=given, height=128)
    assert (found.width, found.height) == (drawn, 128)


@pytest.mark.parametrize(("name", "alias"), [("steps", "num_inference_steps"), ("guidance", "guidance_scale")])
def test_an_alias_counts_where_it_is_given(name, alias):
    assert getattr(request(**{name: 7}), name) == 7
    assert getattr(request(**{name: 7, alias: 3}), name) == 3


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_every_optional_input_may_be_left_blank(blank):
    assert image_request(dict.fromkeys(DEFAULTS, blank) | {"prompt": "a cat"}) == request(prompt="a cat")


def test_minus_one_draws_a_seed_zero_is_one_and_scales_may_be_negative():
    assert request(seed=-1).seed is None
    assert request(seed=0).seed == request(guidance_scale=0).guidance == 0
    found = request(lora_scale=-3, extra_lora_scale=-0.5, extra_placeholder_token="<a>, <b>")
    assert (found.lora_scale, found.extra_lora_scale, found.extra_placeholder_token) == (-3.0, -0.5, ("<a>", "<b>"))


def test_enhance_prompt_appends_the_model_cards_words():
    assert request(prompt="a cat.", enhance_prompt=True).prompt == "a cat, Ultra HD, 4K, cinematic composition."
    assert request(prompt="a cat.").prompt == "a cat."
    assert len(request(prompt="a" * 20_000, enhance_prompt=True).prompt) == 20_000


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty: describe the image"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is None: give text"),
        ({"prompt": "x" * 20_001}, "prompt is 20001 characters long"),
        ({"steps": 0}, "steps is 0: give a whole number from 1 to 200"),
        ({"width": 128}, "width is 128 and height is None: give both, or neither and an aspect_ratio"),
        ({"height": 128}, "width is None and height is 128: give both"),
        ({"width": 63, "height": 64}, "width is 63: give a whole number from 64 to 2048"),
        ({"width": 64, "height": 2049}, "height is 2049: give a whole number from 64 to 2048"),
        ({"aspect_ratio": "5:4"}, "aspect_ratio is '5:4': choose one of 1:1, 16:9"),
    ],
)
def test_every_wrong_input_gets_its_sentence(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        request(**inputs)

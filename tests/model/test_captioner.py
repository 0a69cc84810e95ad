"""Captions by the vision-language model: its inputs are those of transformers' own processor, its words plain and the same."""

import pytest
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from placeholder.model.base import BaseModel
from placeholder.model.captioner import (
    MAX_PIXELS,
    MIN_PIXELS,
    check_vision_tower,
    describe,
    load_vlm,
    plain,
    vlm_bytes,
    vlm_inputs,
)
from tests.support.peak import PeakBytes
from tests.support.samples import picture

# The parts for one image and a text of chat_template.json in Qwen/Qwen2.5-VL-7B-Instruct.
CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT = "Write a caption for this image.\nIts main subject, a {dog}, is called <zwx>: it's 5 years old."


@pytest.fixture(scope="module")
def vlm(vision_base):
    """The whole Qwen2.5-VL. Nothing changes it, so the module shares one."""
    return load_vlm(vision_base)


@pytest.fixture
def caption(vlm, tokenizer):
    """Captions of a few words: the tiny model does not come to an end by itself."""
    return lambda image, text: describe(vlm, tokenizer, image, text, max_new_tokens=6)


@pytest.fixture
def official(tokenizer, monkeypatch):
    """transformers' processor for Qwen2.5-VL, without one for videos, which would need torchvision."""
    monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    images = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return Qwen2_5_VLProcessor(images, tokenizer, None, chat_template=CHAT_TEMPLATE)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (300, 200), (1500, 1000)])
def test_the_inputs_are_those_of_transformers_own_processor(size, official, tokenizer):
    image, text = picture(*size), TEXT
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    expected = official.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    found = vlm_inputs(tokenizer, image, text)
    assert found.keys() == dict(expected).keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert {151652, 151655, 151653} <= set(found["input_ids"][0].tolist())
    height, width = (28 * count // 2 for count in found["image_grid_thw"][0, 1:].tolist())
    assert MIN_PIXELS <= height * width <= MAX_PIXELS


def test_a_caption_is_always_the_same_and_follows_the_image_and_the_instruction(caption):
    asked = [
        caption(picture(96, 64, seed=seed), text) for seed, text in ((0, "What?"), (0, "What?"), (1, "What?"), (0, "Who?"))
    ]
    assert asked[0] == asked[1]
    assert len(set(asked)) == 3
    assert all(text and text.isprintable() for text in asked)


def test_a_caption_is_decoded_greedily(vlm, tokenizer, caption):
    image, text = picture(96, 64), "What?"
    inputs = vlm_inputs(tokenizer, image, text)
    ids = []
    with torch.no_grad():
        for _ in range(6):
            more = torch.tensor([ids], dtype=torch.long)
            rest = {name: torch.cat([inputs[name], 0 * more + kind], dim=1) for name, kind in KINDS.items()}
            rest["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
            logits = vlm(**inputs | rest, use_cache=False).logits[0, -1]
            logits[151646:] = logits[151644] = -torch.inf  # what is no text and ends none
            ids.append(int(logits.argmax()))
    assert caption(image, text) == plain(tokenizer.decode(ids), finished=False)


KINDS = {"attention_mask": 1, "mm_token_type_ids": 0}


def test_the_generation_config_of_a_folder_does_not_count(vlm, caption):
    before = caption(picture(), "What?")
    vlm.generation_config.update(do_sample=True, repetition_penalty=5.0, temperature=9.0)
    assert caption(picture(), "What?") == before


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("A cat  sits\non a\tsofa.\n", True, "A cat sits on a sofa."),
        ('"A cat on a sofa."', True, "A cat on a sofa."),
        ("The image shows a cat on a sofa.", True, "A cat on a sofa."),
        ("In this photograph shows <zwx> asleep.", True, "<zwx> asleep."),
        ("This picture depicts <zwx> asleep.", True, "<zwx> asleep."),
        ("A cat sits. It looks at 3.5 birds and", False, "A cat sits."),
        ("A cat sits on a sofa and", False, "A cat sits on a sofa and"),
        ("A cat sits. It looks", True, "A cat sits. It looks"),
        ("猫が座っている。それは", False, "猫が座っている。"),
        ("a\x00b\u202ec\ufffd", True, "a b c"),
        (" \n", True, ""),
    ],
)
def test_a_caption_is_cleaned_up(text, finished, expected):
    assert plain(text, finished) == expected


def test_a_base_model_without_a_usable_vision_tower_gets_its_sentence(base, vision_base):
    check_vision_tower(vision_base)
    with pytest.raises(
        ValueError, match="^autocaption needs a base model whose text encoder can see, and that of .*tiny-base has"
    ):
        check_vision_tower(base)


def test_a_base_model_without_the_weights_of_its_vision_tower_gets_its_sentence(vision_base, tmp_path):
    folder = tmp_path / "base" / "text_encoder"
    folder.mkdir(parents=True)
    given = load_vlm(vision_base)
    kept = {name: value for name, value in given.state_dict().items() if "visual" not in name}
    given.save_pretrained(folder, state_dict=kept)
    blind = BaseModel(str(folder.parent), torch.device("cpu"), torch.float32)
    check_vision_tower(blind)
    with pytest.raises(ValueError, match=r"that of .* lacks \d+ weights, such as model.visual.*: write a .txt caption"):
        load_vlm(blind)


def test_the_peak_memory_of_captioning_is_counted(vlm, vision_base, caption):
    with PeakBytes() as counted:
        caption(picture(776, 776), TEXT)
    weights = sum(parameter.nbytes for parameter in vlm.parameters())
    assert 0 < counted.peak < vlm_bytes(vision_base) - weights

"""Sample images: which prompts are sampled, and that sampling changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS
from placeholder.report.samples import Sampler, SamplingStopped, grid_prompts, sample_prompts, sample_side
from placeholder.training.context import Context, Training, schedule
from placeholder.training.loop import train_steps
from placeholder.training.setup import prepare
from tests.conftest import SHORT

TOKEN = TrainConfig(**SHORT | {"report": True, "steps": 1000}, train_placeholder_token=True, placeholder_token=("<zwx>",))
BASELINE = replace(TOKEN, train_placeholder_token=False)


@pytest.mark.parametrize(
    ("given", "class_word", "samples", "grid"),
    [
        ("", "", ["<zwx> a", "<zwx> b", "<zwx> c"], ["<zwx> a", "<zwx> b", "<zwx> c", "a"]),
        ("", "dog", ["<zwx> a", "<zwx> b", "<zwx> c"], ["<zwx> a", "<zwx> b", "<zwx> c", "dog a"]),
        (" a cat \n\na <zwx>\na cat", "", ["a cat", "a <zwx>"], ["a cat", "a <zwx>"]),
        ("a <>\na [trigger]", "", ["a <zwx>"], ["a <zwx>"]),
    ],
)
def test_the_prompts_are_those_given_or_the_first_captions(given, class_word, samples, grid):
    captions = ["<zwx> a", "<zwx> a", "<zwx> b", "<zwx> c", "<zwx> d"]
    config = replace(TOKEN, sample_prompts=given, class_word=class_word)
    assert sample_prompts(config, captions) == samples
    assert grid_prompts(config, captions) == grid
    assert grid_prompts(replace(config, report=False), captions) == []


@pytest.mark.parametrize(
    ("steps", "samples", "without"), [(100, 1, False), (299, 1, False), (300, 1, True), (600, 2, True), (1000, 3, True)]
)
def test_a_short_training_samples_fewer_captions(steps, samples, without):
    captions, config = ["<zwx> a", "<zwx> b", "<zwx> c", "<zwx> d"], replace(TOKEN, steps=steps)
    assert sample_prompts(config, captions) == captions[:samples]
    assert grid_prompts(config, captions) == captions[:samples] + ["a"] * without


@pytest.mark.parametrize(("resolution", "side"), [((64,), 64), ((100, 512), 96), ((768, 1024), 512)])
def test_samples_have_the_smallest_resolution_but_no_more_than_512(resolution, side):
    assert sample_side(replace(TOKEN, resolution=resolution)) == side


def prepared(dataset, base, config) -> Training:
    return prepare(dataset, Context(config, base, lambda line: None), grid_prompts)


def trained(dataset, base, config, steps: int = 3) -> Training:
    """A training after some of its steps."""
    training = prepared(dataset, base, config)
    for _ in zip(range(steps), train_steps(training.state, schedule(config), SINGLE_PROCESS), strict=False):
        pass
    return training


def equal(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_the_columns_of_the_grid_are_what_they_say(dataset, base):
    training = trained(dataset, base, TOKEN)
    rows, state = training.tokens.rows.detach().clone(), torch.get_rng_state()
    sampler = Sampler(base, training, 64, lambda: False, steps=2)
    grid = sampler.grid()
    assert list(grid) == ["base model", "LoRA, token reset", "LoRA and token"]
    prompts = list(training.shown_prompts)
    assert prompts == ["a photo of <zwx>", "<zwx> in a garden", "A photo of a person named <zwx>", "a photo of"]
    for row, prompt in enumerate(prompts):
        base_model, reset, full = (images[row] for images in grid.values())
        assert equal(base_model, full) == equal(reset, full) == ("<zwx>" not in prompt)
    ungated = Sampler(base, training, 64, lambda: False, token_gate=False, steps=2).grid()
    for row, prompt in enumerate(prompts):
        base_model, reset, full = (images[row] for images in ungated.values())
        assert equal(reset, full) == ("<zwx>" not in prompt)
        assert not equal(base_model, full) and not equal(full, grid["LoRA and token"][row])
        assert equal(base_model, grid["base model"][row])
    assert torch.equal(training.tokens.rows, rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(equal(*pair) for pair in zip(sampler.sample(prompts), grid["LoRA and token"], strict=True))
    fresh = Sampler(base, prepared(dataset, base, TOKEN), 64, lambda: False, steps=2)
    untrained = fresh.sample(prompts)  # its LoRA is zero, its token embedding the initial one
    assert all(equal(*pair) for pair in zip(untrained, grid["base model"], strict=True))


def test_a_baseline_has_two_columns_and_samples_without_a_text_encoder(dataset, base):
    training = trained(dataset, base, replace(BASELINE, sample_prompts="a cat\na dog"))
    assert training.prompt_embeds.text_encoder is None
    grid = Sampler(base, training, 64, lambda: False, steps=2).grid()
    assert {name: len(images) for name, images in grid.items()} == {"base model": 2, "LoRA": 2}


def test_sampling_stops_within_a_step_once_the_training_is_asked_to(dataset, base):
    asked: list[int] = []
    training = prepared(dataset, base, BASELINE)
    with pytest.raises(SamplingStopped):
        Sampler(base, training, 64, lambda: asked.append(1) or len(asked) == 3).sample(list(training.shown_prompts))
    assert len(asked) == 3

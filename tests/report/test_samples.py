"""Pictures of a training: which prompts are drawn, and that drawing them changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.report import samples as samples_module
from placeholder.report.samples import InterruptedDrawing, Sampler, grid_prompts, sample_prompts
from placeholder.training import setup as prepare_module
from placeholder.training.setup import prepare
from tests.conftest import SHORT

TOKEN = TrainConfig(**SHORT | {"report": True}, train_placeholder_token=True, placeholder_token=("<zwx>",))
BASELINE = TrainConfig(**SHORT | {"report": True})


@pytest.fixture(autouse=True)
def as_in_a_long_training(monkeypatch):
    """The short trainings here draw what a long one draws."""
    monkeypatch.setattr(samples_module, "STEPS_A_CAPTION", 1)


@pytest.mark.parametrize(
    ("given", "class_word", "samples", "grid"),
    [
        ("", "", ["<zwx> a", "<zwx> b", "<zwx> c"], ["<zwx> a", "<zwx> b", "<zwx> c", "a"]),
        ("", "dog", ["<zwx> a", "<zwx> b", "<zwx> c"], ["<zwx> a", "<zwx> b", "<zwx> c", "dog a"]),
        (" a cat \n\na <zwx>\na cat", "", ["a cat", "a <zwx>"], ["a cat", "a <zwx>"]),
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
def test_a_short_training_draws_fewer_captions(steps, samples, without, monkeypatch):
    monkeypatch.undo()
    captions, config = ["<zwx> a", "<zwx> b", "<zwx> c", "<zwx> d"], replace(TOKEN, steps=steps)
    assert sample_prompts(config, captions) == captions[:samples]
    assert grid_prompts(config, captions) == captions[:samples] + ["a"] * without


@pytest.mark.parametrize(("resolution", "side"), [((64,), 64), ((100, 512), 96), ((768, 1024), 512)])
def test_the_pictures_have_the_smallest_resolution_but_no_more_than_512(resolution, side):
    assert Sampler.side_of(replace(TOKEN, resolution=resolution)) == side


def sampler_of(training, base, config, stopping=lambda: False) -> Sampler:
    return Sampler(
        base,
        training.train_state.transformer,
        training.prompt_embeds,
        training.tokens,
        training.prompts,
        training.empty_ids,
        Sampler.side_of(config),
        stopping,
    )


@pytest.fixture(autouse=True)
def quick(tokenizer, monkeypatch):
    """The session's tokenizer, and pictures of two denoising steps."""
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _base: tokenizer)
    monkeypatch.setattr(samples_module, "STEPS", 2)


def trained(dataset, base, config, steps: int = 3):
    """A training after some steps."""
    training = prepare(dataset, config, base, log=lambda line: None)
    for step in training.steps(config):
        if step.number == steps:
            break
    return training


def equal(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_the_columns_of_the_grid_are_what_they_say(dataset, base):
    training = trained(dataset, base, TOKEN)
    rows, state = training.tokens.rows.detach().clone(), torch.get_rng_state()
    sampler = sampler_of(training, base, TOKEN)
    grid = sampler.grid(training.initial_rows)
    assert list(grid) == ["base model", "LoRA, token reset", "LoRA and token"]
    prompts = list(training.prompts)
    assert prompts == ["a photo of <zwx>", "<zwx> in a garden", "A photo of a person named <zwx>", "a photo of"]
    for row, prompt in enumerate(prompts):
        base_model, reset, full = (pictures[row] for pictures in grid.values())
        assert not equal(base_model, full)
        assert equal(reset, full) == ("<zwx>" not in prompt)
    assert torch.equal(training.tokens.rows, rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(equal(*pair) for pair in zip(sampler.draw(prompts), grid["LoRA and token"], strict=True))
    fresh = prepare(dataset, TOKEN, base, log=lambda line: None)
    untrained = sampler_of(fresh, base, TOKEN).draw(prompts)  # its LoRA is zero, its row the initial one
    assert all(equal(*pair) for pair in zip(untrained, grid["base model"], strict=True))


def test_a_baseline_has_two_columns_and_its_prompts_at_hand_without_a_text_encoder(dataset, base):
    config = replace(BASELINE, sample_prompts="a cat\na dog")
    training = trained(dataset, base, config)
    assert training.prompt_embeds.text_encoder is None
    grid = sampler_of(training, base, config).grid(training.initial_rows)
    assert list(grid) == ["base model", "LoRA"]
    assert all(len(pictures) == 2 for pictures in grid.values())


def test_drawing_ends_soon_after_the_training_is_asked_to(dataset, base):
    training = prepare(dataset, BASELINE, base, log=lambda line: None)
    asked: list[int] = []
    sampler = sampler_of(training, base, BASELINE, lambda: asked.append(1) or len(asked) == 3)
    with pytest.raises(InterruptedDrawing):
        sampler.draw(list(training.prompts))
    assert len(asked) == 3

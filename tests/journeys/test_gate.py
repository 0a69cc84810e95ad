"""The token gate in predictions: without its token the base model's image, bit for bit, and a LoRA only where it is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import placeholder
from placeholder.lora.adapter import ADAPTER
from tests.journeys.test_combined import extra  # noqa: F401 - a fixture
from tests.lora.test_distilled import fast, published  # noqa: F401 - fixtures
from tests.support.bases import WatchedBase
from tests.support.interruption import Interruption, raising
from tests.support.predictions import NAMED, PLAIN, Images
from tests.support.stock import apply_archive, stock_pipeline

GATED, GATED_NAMED = replace(PLAIN, token_gate=True), replace(NAMED, token_gate=True)
BEHIND = "a word " * 300 + "<zwx>"  # after the 512 tokens that are encoded
UNNAMED = "the prompt does not name <zwx>, so "
AS_WITHOUT = UNNAMED + "its LoRA is off: put the token into the prompt, or set token_gate to false"


@pytest.fixture(scope="module")
def images(base, fast) -> Images:  # noqa: F811
    """One generator for all tests here: what one does must not be seen in the next."""
    return Images(base, fast)


@pytest.fixture(scope="module")
def fresh(base, fast) -> Images:  # noqa: F811
    """A generator that is never given weights."""
    return Images(base, fast)


REQUESTS = {
    "plain": GATED,
    "no guidance": replace(GATED, guidance=1.0),
    "scale": replace(GATED, lora_scale=-2.5, extra_lora_scale=3.0),
    "behind the cut": replace(GATED, prompt=BEHIND),
    "other case": replace(GATED, prompt="a photo of <ZWX>"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_prompt_without_the_token_gives_the_base_models_image(case, images, fresh, zero_prior, extra):  # noqa: F811
    found = images(REQUESTS[case], zero_prior.archive)
    assert np.array_equal(found, fresh(REQUESTS[case]))
    assert case != "scale" or np.array_equal(found, images(REQUESTS[case], zero_prior.archive, extra))
    assert f"Warning: {AS_WITHOUT}" in images.log
    assert any("512" in line for line in images.warnings()) == (case == "behind the cut")
    assert not np.array_equal(images(replace(REQUESTS[case], token_gate=False), zero_prior.archive), found)
    assert f"Warning: {UNNAMED}the trained subject may not appear" in images.log


@pytest.mark.parametrize("distilled", [True, False])
def test_go_fast_without_the_token_is_the_base_models(distilled, base, images, zero_prior, extra):  # noqa: F811
    generator, fresh_ = (images, Images(base, images.generator.fast)) if distilled else (Images(base), Images(base))
    request = replace(GATED, go_fast=True)
    expected = fresh_(request)
    assert np.array_equal(generator(request, zero_prior.archive, extra), expected)
    assert not np.array_equal(generator(replace(GATED_NAMED, go_fast=True), zero_prior.archive), expected)
    assert np.array_equal(generator(request, zero_prior.archive), expected)


def test_offloaded_and_after_a_failure_it_is_the_base_models(base, fresh, zero_prior):
    offloaded, expected = Images(WatchedBase.of(base, frees=[0])), fresh(GATED)
    with raising("TokenGate._enter", Interruption(), number=3), pytest.raises(Interruption):
        offloaded(GATED_NAMED, zero_prior.archive)
    assert np.array_equal(offloaded(GATED, zero_prior.archive), expected)
    named = offloaded(GATED_NAMED, zero_prior.archive)
    assert np.array_equal(named, Images(base)(GATED_NAMED, zero_prior.archive))
    assert not np.array_equal(named, fresh(GATED_NAMED))


@pytest.mark.parametrize("prompt", [PLAIN.prompt, NAMED.prompt])
@pytest.mark.parametrize("negative", ["blurry", "blurry <zwx>"])
def test_the_lora_acts_in_the_passes_whose_prompt_names_the_token(prompt, negative, images, base, zero_prior):
    request = replace(GATED, prompt=prompt, negative_prompt=negative, lora_scale=1.4)
    found = images(request, zero_prior.archive)
    only = [line for line in images.warnings() if "for the negative prompt alone" in line]
    assert len(only) == ("<zwx>" in negative and "<zwx>" not in prompt)
    pipeline = stock_pipeline(base.source)
    apply_archive(pipeline, zero_prior.archive, 1.4)
    passes = []

    def toggle(*_) -> None:  # a step predicts for the prompt, then for the negative prompt
        named = "<zwx>" in (prompt, negative)[len(passes) % 2]
        (pipeline.transformer.enable_adapters if named else pipeline.transformer.disable_adapters)()
        passes.append(named)

    pipeline.transformer.register_forward_pre_hook(toggle)
    expected = pipeline(
        prompt=prompt,
        negative_prompt=negative,
        true_cfg_scale=request.guidance,
        num_inference_steps=request.steps,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    assert len(passes) == 2 * request.steps
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    ungated = images(replace(request, token_gate=False), zero_prior.archive)
    assert np.array_equal(ungated, found) == all("<zwx>" in text for text in (prompt, negative))


def test_each_of_two_archives_has_its_own_gate(images, zero_prior, extra):  # noqa: F811
    second = replace(GATED, prompt="a photo of <qrs>")
    assert np.array_equal(images(GATED_NAMED, zero_prior.archive, extra), images(GATED_NAMED, zero_prior.archive))
    assert np.array_equal(images(second, extra), images(second, extra, zero_prior.archive))
    both = replace(GATED, prompt="a photo of <zwx> and <qrs>")
    assert not np.array_equal(images(both, zero_prior.archive, extra), images(both, zero_prior.archive))


def test_a_lora_without_a_token_acts_always(images, zero_prior, style):
    alone = images(GATED, style)
    assert np.array_equal(alone, images(PLAIN, style))
    assert np.array_equal(images(GATED, zero_prior.archive, style), alone)


def stock_images(pipeline, **options) -> np.ndarray:
    """Images (B, H, W, 3) of stock diffusers."""
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np", "true_cfg_scale": 4.0}
    return pipeline(**settings, **options, generator=torch.Generator().manual_seed(3)).images


def test_a_loaded_archive_of_diffusers_is_gated(base, zero_prior):
    pipe = stock_pipeline(base.source)
    named, plain = {"prompt": "a photo of <zwx>", "negative_prompt": " "}, {"prompt": "a garden", "negative_prompt": " "}
    long = {"prompt": "a garden " * 300, "negative_prompt": " "}  # 600 tokens, of which the pipeline keeps 512
    before = [stock_images(pipe, **each) for each in (plain, named, long)]
    twice = stock_images(pipe, **plain, num_images_per_prompt=2)
    placeholder.load(pipe, zero_prior.archive)
    several = {"prompt": ["a garden", "a photo of <zwx>"], "negative_prompt": [" ", " "]}
    mixed = stock_images(pipe, **several)
    assert np.array_equal(stock_images(pipe, **plain), before[0])
    assert np.array_equal(stock_images(pipe, **plain, num_images_per_prompt=2), twice)
    assert not np.array_equal(stock_images(pipe, **named), before[1])
    assert np.array_equal(stock_images(pipe, **long), before[2])
    embeds, mask = pipe.encode_prompt(prompt="a garden")
    negative, negative_mask = pipe.encode_prompt(prompt=" ")
    again = stock_images(
        pipe,
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
    )
    assert np.array_equal(again, before[0])
    placeholder.load(pipe, zero_prior.archive, token_gate=False)
    assert not np.array_equal(stock_images(pipe, **plain), before[0])
    assert np.abs(stock_images(pipe, **several) - mixed).max() > 2 / 255
    placeholder.unload(pipe)
    assert np.array_equal(stock_images(pipe, **plain), before[0])
    assert ADAPTER not in getattr(pipe.transformer, "peft_config", {})

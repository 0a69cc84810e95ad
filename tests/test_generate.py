"""Predictions: the same images as stock diffusers, and no trace of one request in the next."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from placeholder.generate import save_image
from placeholder.lora.adapter import PREFIX, overwrite_lora
from placeholder.model.loading import load_text_encoder
from placeholder.weights.archive import LORA_NAME
from predict import Predictor
from tests.support.interruption import calls
from tests.support.predictions import NAMED, PLAIN, Images
from tests.support.samples import picture, read_zip, write_zip
from tests.support.stock import stock_picture


@pytest.fixture(scope="module")
def generate(base) -> Images:
    """One generator for all tests here: what one does must not be seen in the next."""
    return Images(base)


@pytest.fixture(scope="module")
def fresh_images(base) -> dict[str, np.ndarray]:
    """The images of a generator that has never had any weights, by prompt."""
    fresh = Images(base)
    return {request.prompt: fresh(request) for request in (PLAIN, NAMED)}


@pytest.fixture(scope="module")
def plain_image(fresh_images) -> np.ndarray:
    """The fresh image of the prompt without the token."""
    return fresh_images[PLAIN.prompt]


@pytest.fixture
def zipped(zero_prior, tmp_path):
    """Writes the zero-prior archive with some entries changed."""
    return lambda changed: write_zip(tmp_path / "changed.zip", read_zip(zero_prior.archive) | changed)


STOCK_CASES = {
    "token": ("zero_prior", {"prompt": "a photo of <zwx>"}),
    "token, scale, negative prompt": (
        "zero_prior",
        {"prompt": "<zwx> in a garden, <zwx>", "lora_scale": 1.7, "negative_prompt": "blurry, low quality"},
    ),
    "baseline, no guidance, oblong": ("baseline", {"prompt": "a photo of TOK", "guidance": 1.0, "width": 96, "height": 64}),
    "base": (None, {"prompt": "a photo of <zwx>"}),
}


@pytest.mark.parametrize("case", STOCK_CASES)
def test_an_image_equals_the_one_of_stock_diffusers(case, generate, base, request):
    run, options = STOCK_CASES[case]
    archive = request.getfixturevalue(run).archive if run else None
    found = generate(replace(PLAIN, **options), archive)
    expected = stock_picture(base.source, archive=archive, **options)
    assert found.shape == expected.shape
    rounding = options.get("lora_scale", 1.0) != 1.0  # a scale is multiplied within the product, in PEFT after it
    assert np.abs(found.astype(int) - expected).max() <= rounding
    if case == "token":  # the VAE as stock diffusers has it rounds otherwise
        untouched = stock_picture(base.source, archive=archive, **options, two_dimensional_vae=False)
        assert np.abs(found.astype(int) - untouched.astype(int)).max() <= 1


@pytest.mark.parametrize("request_", [PLAIN, NAMED], ids=["plain", "named"])
def test_after_weights_a_request_without_is_a_fresh_generators_bit_for_bit(request_, generate, zero_prior, fresh_images):
    with_weights = generate(replace(request_, lora_scale=2.0), zero_prior.archive)
    assert not np.array_equal(with_weights, fresh_images[request_.prompt])
    assert np.array_equal(generate(request_), fresh_images[request_.prompt])


def test_the_lora_scale_changes_the_image_and_does_not_last(generate, zero_prior, plain_image):
    once = generate(NAMED, zero_prior.archive)
    assert not np.array_equal(once, generate(replace(NAMED, lora_scale=2.0), zero_prior.archive))
    assert np.array_equal(generate(replace(PLAIN, lora_scale=0.0), zero_prior.archive), plain_image)
    assert not np.array_equal(generate(replace(NAMED, lora_scale=0.0), zero_prior.archive), generate(NAMED))  # the token alone
    assert np.array_equal(once, generate(NAMED, zero_prior.archive))


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a cat"}, {"negative_prompt": "blurry"}, {"steps": 7}, {"guidance": 3.0}, {"guidance": 1.0}, {"seed": 0}],
)
def test_every_part_of_a_request_changes_the_image(changed, generate, plain_image):
    assert not np.array_equal(generate(replace(PLAIN, **changed)), plain_image)


def test_an_empty_negative_prompt_is_a_space_and_without_guidance_it_is_not_used(generate, plain_image):
    assert np.array_equal(generate(replace(PLAIN, negative_prompt=" ")), plain_image)
    unguided = replace(PLAIN, guidance=1.0)
    assert np.array_equal(generate(unguided), generate(replace(unguided, negative_prompt="blurry")))


def test_a_single_step_gives_the_models_first_prediction(generate, plain_image):
    assert generate(replace(PLAIN, steps=1, guidance=1.0)).std() > 1  # diffusers alone gives a black image
    assert np.array_equal(generate(PLAIN), plain_image)


def test_a_random_seed_is_logged_and_gives_the_same_image_again(generate):
    first = generate(replace(PLAIN, seed=None))
    (seed,) = (found[1] for line in generate.log if (found := re.fullmatch(r"Seed: (\d+) \(drawn\), size: 64x64", line)))
    assert np.array_equal(generate(replace(PLAIN, seed=int(seed))), first)
    assert f"Seed: {seed}, size: 64x64" in generate.log


def test_each_step_has_a_progress_line(generate):
    generate(PLAIN)
    lines = [line for line in generate.log if re.match(r" *\d+%\|[ #0-9]{10}\| \d+/6 \[", line)]
    assert [line.split("|")[2].split("/")[0].strip() for line in lines] == list("123456")
    assert lines[-1].startswith("100%|##########| 6/6 ")


def test_weights_are_applied_again_only_when_their_content_changes(generate, zero_prior, tmp_path):
    generate(NAMED)
    generate(NAMED, zero_prior.archive)
    assert generate.log[:2] == [
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Weights applied: 32 LoRA tensors, 1 embeddings",
    ]
    copy = tmp_path / "another-name.bin"
    copy.write_bytes(zero_prior.archive.read_bytes())
    generate(NAMED, copy)
    assert not any(line.startswith("Weights applied") for line in generate.log)


def test_archives_switch_without_reading_them_again_until_four_others_were_used(
    generate, zero_prior, baseline, zipped, tmp_path
):
    others = [baseline.archive]
    for number in range(3):
        meta = json.loads(zero_prior.entry("meta.json")) | {"created": str(number)}
        others.append(zipped({"meta.json": json.dumps(meta).encode()}).rename(tmp_path / f"{number}.zip"))
    generate(PLAIN)
    generate.forget()
    with calls("read_weights") as done:
        for archive in (zero_prior.archive, baseline.archive, zero_prior.archive, baseline.archive):
            generate.generator.load(archive)
        assert len(done) == 2
        for archive in (*others, zero_prior.archive):
            generate.generator.load(archive)
        assert len(done) == 6


def test_archives_of_one_shape_switch_by_their_weights_alone(generate, base, zero_prior, baseline):
    alone = [Images(base)(PLAIN, run.archive) for run in (zero_prior, baseline)]
    generate(PLAIN, zero_prior.archive)
    with calls("load_lora") as loaded:
        switched = [generate(PLAIN, run.archive) for run in (zero_prior, baseline)]
    assert loaded == [] and all(map(np.array_equal, switched, alone)) and not np.array_equal(*alone)


def test_a_lora_of_another_rank_or_with_nan_does_not_overwrite_the_applied_one(generate, zero_prior):
    generate(PLAIN, zero_prior.archive)
    transformer = generate.generator.pipeline.transformer
    state = {key.removeprefix(PREFIX): value for key, value in zero_prior.tensors(LORA_NAME).items()}
    assert overwrite_lora(transformer, state)
    rank_one = {key: value[:1] if "lora_A" in key else value[:, :1] for key, value in state.items()}
    for other in (rank_one, dict(list(state.items())[:2]), {key: value * float("nan") for key, value in state.items()}):
        assert not overwrite_lora(transformer, other)


@pytest.mark.parametrize("sign", ["<>", "[trigger]", "[Name]"])
def test_the_signs_of_captions_are_the_token_in_a_prompt_too(sign, generate, zero_prior):
    named = replace(NAMED, prompt="a photo of <zwx>", negative_prompt="<zwx>", guidance=2.0)
    signed = replace(named, prompt=f"a photo of {sign}", negative_prompt=sign)
    assert np.array_equal(generate(signed, zero_prior.archive), generate(named, zero_prior.archive))
    assert not generate.warnings()


def test_a_prompt_that_does_not_name_the_token_is_warned_about(generate, zero_prior):
    generate(PLAIN, zero_prior.archive)
    assert generate.warnings() == ["Warning: the prompt does not name <zwx>, so the trained subject may not appear"]
    generate(NAMED, zero_prior.archive)
    assert not generate.warnings()


def test_what_is_left_out_of_a_prompt_is_said(generate, zero_prior):
    late = "a harbor at dusk, " + "with many small boats, " * 110 + "in the style of <zwx>"
    cut = replace(NAMED, prompt=late, negative_prompt="no " * 600, guidance=2.0)
    image = generate(cut, zero_prior.archive)
    assert generate.warnings() == [
        "Warning: of the prompt 49 of 561 tokens are left out, among them <zwx> (a prompt is cut after 512)",
        "Warning: of the negative prompt 89 of 601 tokens are left out (a prompt is cut after 512)",
        "Warning: the prompt does not name <zwx>, so the trained subject may not appear",
    ]
    assert np.array_equal(generate(replace(cut, prompt=late.replace("<zwx>", "it")), zero_prior.archive), image)
    generate(replace(cut, prompt=f"in the style of <zwx>, {late}", guidance=1.0), zero_prior.archive)
    assert generate.warnings() == ["Warning: of the prompt 56 of 568 tokens are left out (a prompt is cut after 512)"]


def test_weights_of_another_base_model_are_warned_about(generate, zero_prior, zipped):
    meta = zero_prior.meta | {"base_model": "some/other"}
    generate(NAMED, zipped({"meta.json": json.dumps(meta).encode()}))
    assert generate.warnings() == [f"Warning: trained on base_model 'some/other', applied to {generate.generator.base.source}"]


def test_predictions_leave_tokenizer_and_text_encoder_as_they_were(generate, base, zero_prior):
    generate(NAMED, zero_prior.archive)
    assert len(generate.generator.tokenizer) == 151665
    before, after = load_text_encoder(base).state_dict(), generate.generator.text_encoder.state_dict()
    assert len(after["embed_tokens.weight"]) == 152064
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_go_fast_without_a_distilled_lora_skips_blocks_and_does_not_last(generate, plain_image):
    transformer = generate.generator.pipeline.transformer
    calls = []
    counting = transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    # Random weights answer to each timestep anew; a trained first block changes little from step to step, and so does this.
    embedder = transformer.time_text_embed.timestep_embedder.linear_2.weight
    original = embedder.detach().clone()
    try:
        embedder.data.mul_(0.01)
        counts, images = [], []
        for go_fast in (False, True, False):
            calls.clear()
            images.append(generate(replace(PLAIN, steps=20, go_fast=go_fast)))
            counts.append(len(calls))
    finally:
        counting.remove()
        embedder.data.copy_(original)
    assert counts[0] == counts[2] == 40  # with guidance, a step runs the transformer twice
    assert counts[1] < 30
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(generate(PLAIN), plain_image)


@pytest.mark.parametrize(
    ("name", "sentence"), [(LORA_NAME, "NaN or infinite numbers"), ("meta.json", "the token ids of the archive")]
)
def test_weights_that_do_not_fit_get_their_sentence_and_the_base_model_stays(
    name, sentence, generate, zero_prior, zipped, plain_image
):
    """What may be wrong stands in tests/lora/test_adapter.py and tests/tokens."""
    nan = save({key: value * float("nan") for key, value in zero_prior.tensors(LORA_NAME).items()})
    changed = {LORA_NAME: nan, "meta.json": b'{"placeholder_token_ids": {"<zwx>": [151700]}}'}
    with pytest.raises(ValueError, match=sentence):
        generate(PLAIN, zipped({name: changed[name]}))
    assert np.array_equal(generate(PLAIN), plain_image)


def test_weights_that_cannot_be_read_get_their_sentence_and_the_applied_ones_stay(generate, zero_prior, tmp_path):
    before = generate(NAMED, zero_prior.archive)
    path = tmp_path / "junk.zip"
    for content, sentence in ((None, "give a weights.zip or a LoRA in safetensors"), (b"junk", "neither a zip nor a tar")):
        if content:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            generate(NAMED, path)
    assert np.array_equal(generate(NAMED, zero_prior.archive), before)


@pytest.mark.parametrize("by_url", [False, True], ids=["path", "url"])
def test_setup_applies_the_weights_that_the_model_is_started_with(by_url, generate, base, zero_prior, site, monkeypatch):
    monkeypatch.setenv("QWEN_IMAGE_MODEL", base.source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    address, folder = site
    (folder / "weights.zip").write_bytes(zero_prior.archive.read_bytes())
    predictor = Predictor()
    predictor.setup(f"{address}/weights.zip" if by_url else str(folder / "weights.zip"))
    found = predictor.generator.generate(NAMED, predictor.default_weights)
    assert np.array_equal(found, generate(NAMED, zero_prior.archive))
    assert predictor.default_weights.exists()
    predictor.kept.close()
    assert predictor.default_weights.exists() == (not by_url)


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_an_image_is_saved_in_the_format_that_was_asked_for(output_format, kind, tmp_path):
    path = save_image(picture(), replace(PLAIN, output_format=output_format), tmp_path)
    assert path.name == f"output.{output_format}"
    saved = Image.open(path)
    assert (saved.format, saved.size) == (kind, (64, 64))
    difference = np.abs(np.asarray(saved.convert("RGB")).astype(int) - np.asarray(picture())).mean()
    assert difference == 0 if output_format == "png" else 0 < difference < 4


@pytest.mark.parametrize("output_format", ["jpg", "webp"])
def test_a_higher_quality_makes_a_larger_file(output_format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sizes = []
    for quality in (0, 20, 80, 100):
        request = replace(PLAIN, output_format=output_format, output_quality=quality)
        sizes.append(save_image(noise, request, tmp_path).stat().st_size)
    assert sizes == sorted(set(sizes))

"""Predictions: the same pictures as stock diffusers, and no trace of one request in the next."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from PIL import Image
from safetensors.torch import save

from placeholder import generate as generate_module
from placeholder.generate import ImageGenerator, save_image
from placeholder.lora.adapter import PREFIX, load_lora, overwrite_lora
from placeholder.lora.distilled import FastLora
from placeholder.model.loading import load_text_encoder
from placeholder.request import Request
from placeholder.weights.archive import LORA_NAME
from predict import Predictor
from tests.support.samples import picture, read_zip, write_zip
from tests.support.stock import stock_picture

PLAIN = Request(
    prompt="a garden at noon",
    negative_prompt="",
    steps=6,
    guidance=4.0,
    width=64,
    height=64,
    seed=7,
    lora_scale=1.0,
    go_fast=False,
    output_format="png",
    output_quality=80,
)
NAMED = replace(PLAIN, prompt="a photo of <zwx>")


class Drawer:
    """A generator whose pictures are arrays, and its log."""

    def __init__(self, base, fast: FastLora | None = None):
        self.log: list[str] = []
        self.generator = ImageGenerator(base, self.log.append, fast)

    def __call__(self, request: Request, weights: Path | None = None, extra: Path | None = None) -> np.ndarray:
        self.log.clear()
        return np.asarray(self.generator.generate(request, weights, extra))


@pytest.fixture(scope="module")
def draw(base) -> Drawer:
    """One generator for all tests here: what one does must not be seen in the next."""
    return Drawer(base)


@pytest.fixture(scope="module")
def fresh_pictures(base) -> dict[str, np.ndarray]:
    """What a generator draws that has never seen any weights, by prompt."""
    fresh = Drawer(base)
    return {request.prompt: fresh(request) for request in (PLAIN, NAMED)}


@pytest.fixture(scope="module")
def plain_picture(fresh_pictures) -> np.ndarray:
    """The fresh picture of the prompt without the token."""
    return fresh_pictures[PLAIN.prompt]


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
def test_a_picture_equals_the_one_that_stock_diffusers_draws(case, draw, base, request):
    run, options = STOCK_CASES[case]
    archive = request.getfixturevalue(run).archive if run else None
    found = draw(replace(PLAIN, **options), archive)
    expected = stock_picture(base.source, archive=archive, **options)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    untouched = stock_picture(base.source, archive=archive, **options, two_dimensional_vae=False)
    assert np.abs(found.astype(int) - untouched.astype(int)).max() <= 1


@pytest.mark.parametrize("request_", [PLAIN, NAMED], ids=["plain", "named"])
def test_after_weights_a_request_without_is_a_fresh_generators_bit_for_bit(request_, draw, zero_prior, fresh_pictures):
    with_weights = draw(replace(request_, lora_scale=2.0), zero_prior.archive)
    assert not np.array_equal(with_weights, fresh_pictures[request_.prompt])
    assert np.array_equal(draw(request_), fresh_pictures[request_.prompt])


def test_archives_a_b_a_give_the_pictures_of_a_and_b_alone(draw, base, zero_prior, baseline):
    first, other, again = draw(NAMED, zero_prior.archive), draw(NAMED, baseline.archive), draw(NAMED, zero_prior.archive)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(other, Drawer(base)(NAMED, baseline.archive))


def test_a_lora_at_scale_zero_and_a_prompt_without_the_token_is_the_base_model(draw, zero_prior, plain_picture):
    assert np.array_equal(draw(replace(PLAIN, lora_scale=0.0), zero_prior.archive), plain_picture)


def test_the_token_changes_the_picture_at_lora_scale_zero(draw, zero_prior):
    with_row = draw(replace(NAMED, lora_scale=0.0), zero_prior.archive)
    assert not np.array_equal(with_row, draw(NAMED))


def test_the_lora_scale_changes_the_picture_and_does_not_last(draw, zero_prior):
    once = draw(NAMED, zero_prior.archive)
    assert not np.array_equal(once, draw(replace(NAMED, lora_scale=2.0), zero_prior.archive))
    assert np.array_equal(once, draw(NAMED, zero_prior.archive))


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a cat"}, {"negative_prompt": "blurry"}, {"steps": 7}, {"guidance": 3.0}, {"guidance": 1.0}, {"seed": 0}],
)
def test_every_part_of_a_request_changes_the_picture(changed, draw, plain_picture):
    assert not np.array_equal(draw(replace(PLAIN, **changed)), plain_picture)


def test_an_empty_negative_prompt_guides_as_a_space_and_without_guidance_it_is_not_used(draw, plain_picture):
    assert np.array_equal(draw(replace(PLAIN, negative_prompt=" ")), plain_picture)
    unguided = replace(PLAIN, guidance=1.0)
    assert np.array_equal(draw(unguided), draw(replace(unguided, negative_prompt="blurry")))


def test_a_drawn_seed_is_logged_and_draws_the_same_again(draw):
    first = draw(replace(PLAIN, seed=None))
    (seed,) = (found[1] for line in draw.log if (found := re.fullmatch(r"Seed: (\d+) \(drawn\), size: 64x64", line)))
    assert np.array_equal(draw(replace(PLAIN, seed=int(seed))), first)
    assert f"Seed: {seed}, size: 64x64" in draw.log


def test_each_step_has_a_progress_line(draw):
    draw(PLAIN)
    lines = [line for line in draw.log if re.match(r" *\d+%\|[ #0-9]{10}\| \d+/6 \[", line)]
    assert [line.split("|")[2].split("/")[0].strip() for line in lines] == list("123456")
    assert lines[-1].startswith("100%|##########| 6/6 ")


def test_weights_are_logged_once_and_applied_again_only_when_their_content_changes(draw, zero_prior, tmp_path):
    draw(NAMED)
    draw(NAMED, zero_prior.archive)
    assert draw.log[:2] == [
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Weights applied: 32 LoRA tensors, 1 embeddings",
    ]
    copy = tmp_path / "another-name.bin"
    copy.write_bytes(zero_prior.archive.read_bytes())
    draw(NAMED, copy)
    assert not any(line.startswith("Weights applied") for line in draw.log)


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What is read and encoded from here on, in order."""
    done: list[str] = []
    for name in ("read_weights", "encode_prompts"):
        original = getattr(generate_module, name)

        def noted(*args, name=name, original=original):
            done.append(name)
            return original(*args)

        monkeypatch.setattr(generate_module, name, noted)
    return done


def test_the_same_prompt_and_archive_are_neither_encoded_nor_read_again(base, zero_prior, work):
    fresh = Drawer(base)
    first = fresh(NAMED, zero_prior.archive)
    assert work == ["read_weights", "encode_prompts", "encode_prompts"]
    again = fresh(NAMED, zero_prior.archive)
    assert np.array_equal(first, again) and len(work) == 3
    fresh(PLAIN, zero_prior.archive)
    assert work[3:] == ["encode_prompts"]  # the negative prompt is the same


def test_a_prompt_is_encoded_again_with_other_weights(base, zero_prior, work):
    fresh = Drawer(base)
    fresh(NAMED, zero_prior.archive)
    fresh(NAMED)
    assert work == ["read_weights", *["encode_prompts"] * 4]


def test_archives_switch_without_reading_them_again_until_four_others_were_used(
    base, zero_prior, baseline, zipped, work, tmp_path
):
    fresh = Drawer(base)
    others = [baseline.archive]
    for number in range(3):
        meta = json.loads(zero_prior.entry("meta.json")) | {"created": str(number)}
        others.append(zipped({"meta.json": json.dumps(meta).encode()}).rename(tmp_path / f"{number}.zip"))
    for archive in (zero_prior.archive, baseline.archive, zero_prior.archive, baseline.archive):
        fresh.generator.load(archive)
    assert work == ["read_weights"] * 2
    for archive in (*others, zero_prior.archive):
        fresh.generator.load(archive)
    assert work == ["read_weights"] * 6


def test_a_prompt_that_does_not_name_the_token_is_warned_about(draw, zero_prior):
    draw(PLAIN, zero_prior.archive)
    assert [line for line in draw.log if line.startswith("Warning: the prompt does not name <zwx>")]
    draw(NAMED, zero_prior.archive)
    assert not [line for line in draw.log if line.startswith("Warning")]


def test_weights_of_another_base_model_are_warned_about(draw, zero_prior, zipped):
    meta = zero_prior.meta | {"base_model": "some/other"}
    draw(NAMED, zipped({"meta.json": json.dumps(meta).encode()}))
    assert f"Warning: trained on base_model 'some/other', applied to {draw.generator.base.source}" in draw.log


def test_a_bare_lora_draws_what_its_archive_draws_without_the_token(draw, zero_prior, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(zero_prior.entry(LORA_NAME))
    assert np.array_equal(draw(PLAIN, path), draw(PLAIN, zero_prior.archive))


def test_a_token_of_two_vectors_is_two_consecutive_ids(draw, base, tokenizer, zero_prior, zipped):
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    meta = zero_prior.meta | {"placeholder_token_ids": {"<zwx>": [151665, 151666]}}
    changed = {"embeddings/zwx.safetensors": save({"qwen25_7b": rows}), "meta.json": json.dumps(meta).encode()}
    draw(NAMED, zipped(changed))
    assert "Placeholder token '<zwx>' registered with ID: 151665, 151666" in draw.log
    assert draw.generator.tokens.tokenize(tokenizer, "a photo of <zwx>") == [64, 6548, 315, 220, 151665, 151666]
    assert torch.equal(draw.generator.tokens.rows.detach(), rows)


def test_predictions_leave_tokenizer_and_text_encoder_as_they_were(draw, base, zero_prior):
    draw(NAMED, zero_prior.archive)
    assert len(draw.generator.tokenizer) == 151665
    before, after = load_text_encoder(base).state_dict(), draw.generator.text_encoder.state_dict()
    assert len(after["embed_tokens.weight"]) == 152064
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_go_fast_skips_blocks_and_leaves_no_trace(draw, plain_picture):
    transformer = draw.generator.pipeline.transformer
    calls = []
    counting = transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    # Random weights answer to each timestep anew; a trained first block changes little from step to step, and so does this.
    embedder = transformer.time_text_embed.timestep_embedder.linear_2.weight
    original = embedder.detach().clone()
    try:
        embedder.data.mul_(0.01)
        counts, pictures = [], []
        for go_fast in (False, True, False):
            calls.clear()
            pictures.append(draw(replace(PLAIN, steps=20, go_fast=go_fast)))
            counts.append(len(calls))
    finally:
        counting.remove()
        embedder.data.copy_(original)
    assert counts[0] == counts[2] == 40  # with guidance, a step asks twice
    assert counts[1] < 30
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(draw(PLAIN), plain_picture)


def test_an_interrupted_go_fast_leaves_no_trace(base, plain_picture, monkeypatch):
    fresh = Drawer(base)
    transformer = fresh.generator.pipeline.transformer

    def interrupted(config: FirstBlockCacheConfig) -> None:
        apply_first_block_cache(transformer, config)  # all of enable_cache but its last line
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transformer, "enable_cache", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh(replace(PLAIN, go_fast=True))
    assert np.array_equal(fresh(PLAIN), plain_picture)
    first = fresh(replace(PLAIN, go_fast=True))  # the hooks can be put on again
    assert np.array_equal(fresh(replace(PLAIN, go_fast=True)), first)
    assert np.array_equal(fresh(PLAIN), plain_picture)


def test_go_fast_works_together_with_weights(draw, zero_prior, plain_picture):
    slow = draw(NAMED, zero_prior.archive)
    draw(replace(NAMED, go_fast=True), zero_prior.archive)
    assert np.array_equal(draw(NAMED, zero_prior.archive), slow)
    assert np.array_equal(draw(PLAIN), plain_picture)


def wrong_lora(change) -> bytes:
    """A LoRA of one layer after `change`."""
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)}
    return save(change(tensors))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {LORA_NAME: wrong_lora(lambda t: {k.replace("blocks.0", "blocks.9"): v for k, v in t.items()})},
            "the LoRA was made for another model: this one has no linear layer 'transformer_blocks.9.attn.to_q'",
        ),
        ({LORA_NAME: wrong_lora(lambda t: {k: v[:, :3].clone() for k, v in t.items()})}, "the LoRA was made for another model"),
        ({LORA_NAME: wrong_lora(lambda t: {k: v * float("nan") for k, v in t.items()})}, "NaN or infinite numbers"),
        ({LORA_NAME: wrong_lora(lambda t: dict(list(t.items())[:1]))}, "needs both lora_A and lora_B"),
        (
            {"embeddings/zwx.safetensors": save({"qwen25_7b": torch.ones(1, 3584)})},
            r"the embedding of <zwx> has shape \(1, 3584\): this base model takes \(k, 32\)",
        ),
        (
            {"meta.json": json.dumps({"placeholder_token_ids": {"<zwx>": [151700]}}).encode()},
            "the token ids of the archive are .*151700.*, here they are .*151665.*: it was trained on another base",
        ),
    ],
)
def test_weights_that_do_not_fit_get_their_sentence_and_the_base_model_stays(changed, sentence, draw, zipped, plain_picture):
    with pytest.raises(ValueError, match=sentence):
        draw(PLAIN, zipped(changed))
    assert np.array_equal(draw(PLAIN), plain_picture)


def test_weights_that_are_not_there_get_their_sentence(draw, tmp_path):
    with pytest.raises(ValueError, match="give a weights.zip or a LoRA in safetensors"):
        draw(PLAIN, tmp_path / "none.zip")


def test_bad_weights_do_not_end_what_good_ones_draw(draw, zero_prior, tmp_path):
    before = draw(NAMED, zero_prior.archive)
    path = tmp_path / "junk.zip"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        draw(NAMED, path)
    assert np.array_equal(draw(NAMED, zero_prior.archive), before)


@pytest.mark.parametrize("by_url", [False, True], ids=["path", "url"])
def test_setup_applies_the_weights_that_the_model_is_started_with(by_url, draw, base, zero_prior, site, monkeypatch):
    monkeypatch.setenv("QWEN_IMAGE_MODEL", base.source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(generate_module, "load_tokenizer", lambda _base: draw.generator.tokenizer)
    address, folder = site
    (folder / "weights.zip").write_bytes(zero_prior.archive.read_bytes())
    predictor = Predictor()
    predictor.setup(f"{address}/weights.zip" if by_url else str(folder / "weights.zip"))
    found = predictor.generator.generate(NAMED, predictor.default_weights)
    assert np.array_equal(found, draw(NAMED, zero_prior.archive))
    assert predictor.default_weights.exists()
    predictor.kept.close()
    assert predictor.default_weights.exists() == (not by_url)


@pytest.mark.parametrize("step", ["unload_lora", "_tokens"])
def test_an_interrupted_unload_is_undone_by_the_next_request(step, base, zero_prior, fresh_pictures, monkeypatch):
    fresh = Drawer(base)
    trained = fresh(NAMED, zero_prior.archive)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module if step == "unload_lora" else fresh.generator, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fresh(NAMED)
    monkeypatch.undo()
    assert fresh.generator.applied == generate_module.INCOMPLETE
    assert np.array_equal(fresh(NAMED), fresh_pictures[NAMED.prompt])
    assert np.array_equal(fresh(NAMED, zero_prior.archive), trained)


def test_an_interrupted_load_is_undone_by_the_next_request(draw, zero_prior, plain_picture, monkeypatch):
    def interrupted(transformer, state, adapter):
        load_lora(transformer, state, adapter)
        raise KeyboardInterrupt

    draw(PLAIN)
    monkeypatch.setattr(generate_module, "load_lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(PLAIN, zero_prior.archive)
    assert np.array_equal(draw(PLAIN), plain_picture)
    monkeypatch.undo()
    assert np.array_equal(draw(replace(PLAIN, lora_scale=0.0), zero_prior.archive), plain_picture)
    assert draw.log[0].startswith("Placeholder token")


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_is_saved_in_the_format_that_was_asked_for(output_format, kind, tmp_path):
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


def test_the_lora_of_the_archive_is_the_one_that_is_applied(draw, zero_prior):
    draw(NAMED, zero_prior.archive)
    applied = {
        name.removesuffix(".default.weight"): value
        for name, value in draw.generator.pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    stored = zero_prior.tensors(LORA_NAME)
    assert applied.keys() == {key.removeprefix("transformer.").removesuffix(".weight") for key in stored}
    for key, value in stored.items():
        assert torch.equal(applied[key.removeprefix("transformer.").removesuffix(".weight")], value.float())


def test_a_single_step_draws_the_models_first_guess(draw, plain_picture):
    once = draw(replace(PLAIN, steps=1, guidance=1.0))
    assert once.std() > 1  # diffusers alone draws black
    assert np.array_equal(draw(PLAIN), plain_picture)


def test_archives_of_one_shape_switch_by_their_weights_alone(draw, base, zero_prior, baseline, monkeypatch):
    alone = [Drawer(base)(PLAIN, run.archive) for run in (zero_prior, baseline)]
    draw(PLAIN, zero_prior.archive)
    loaded = []
    monkeypatch.setattr(generate_module, "load_lora", lambda *args: loaded.append(args))
    switched = [draw(PLAIN, run.archive) for run in (zero_prior, baseline)]
    assert loaded == [] and all(map(np.array_equal, switched, alone)) and not np.array_equal(*alone)


def test_a_switch_that_is_interrupted_is_undone_by_the_next_request(draw, zero_prior, baseline, plain_picture, monkeypatch):
    draw(PLAIN, zero_prior.archive)
    overwrite = generate_module.overwrite_lora

    def interrupted(*args):
        overwrite(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_module, "overwrite_lora", interrupted)
        draw(PLAIN, baseline.archive)
    assert np.array_equal(draw(PLAIN), plain_picture)


def test_a_lora_of_another_rank_or_with_nan_is_not_written_over_the_one_that_is_applied(draw, zero_prior):
    draw(PLAIN, zero_prior.archive)
    transformer = draw.generator.pipeline.transformer
    state = {key.removeprefix(PREFIX): value for key, value in zero_prior.tensors(LORA_NAME).items()}
    assert overwrite_lora(transformer, state)
    assert not overwrite_lora(
        transformer, {key: value[:1] if "lora_A" in key else value[:, :1] for key, value in state.items()}
    )
    assert not overwrite_lora(transformer, dict(list(state.items())[:2]))
    assert not overwrite_lora(transformer, {key: value * float("nan") for key, value in state.items()})

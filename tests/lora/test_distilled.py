"""`go_fast` with a step-distilled LoRA: the image of stock diffusers with both LoRAs, and no trace of it afterwards."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save, save_file

from placeholder.lora.distilled import FAST_VARIABLE, STEPS_VARIABLE, FastLora, line_of, load_fast_lora, steps_of
from placeholder.model.base import DEFAULT_MODEL, QWEN_IMAGE, BaseModel
from placeholder.model.loading import load_transformer
from predict import Predictor
from tests.support.bases import WatchedBase
from tests.support.interruption import CHANGING, interrupt_anywhere
from tests.support.predictions import NAMED, PLAIN, Images
from tests.support.samples import WithoutWeights
from tests.support.stock import apply_archive, stock_pipeline
from tests.test_request import DEFAULTS

STEPS, RANK, ALPHA = 3, 8, 2.0
NAME = f"Qwen-Image-Lightning-{STEPS}steps-V2.0.safetensors"
FAST, FAST_NAMED = replace(PLAIN, go_fast=True), replace(NAMED, go_fast=True)
# What the model card of lightx2v/Qwen-Image-Lightning gives the scheduler, without what are its defaults.
PUBLISHED_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "use_dynamic_shifting": True,
}


@pytest.fixture(scope="module")
def published(base, tmp_path_factory) -> Path:
    """A LoRA as it is published: bare names, lora_down, lora_up and alpha, on attention and feed-forward of both streams."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, layer in load_transformer(base).named_modules():
        if isinstance(layer, torch.nn.Linear) and (".attn." in name or "_mlp." in name):
            tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(RANK, layer.in_features, generator=generator)
            tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(layer.out_features, RANK, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    assert len(tensors) == 2 * 12 * 3
    path = tmp_path_factory.mktemp("fast") / NAME
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def fast(base, published) -> FastLora:
    """That LoRA, read and checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAST_VARIABLE, str(published))
        return load_fast_lora(base, lambda line: None)


@pytest.fixture(scope="module")
def draw(base, fast) -> Images:
    """One generator for all tests here: what one does must not be seen in the next."""
    return Images(base, fast)


@pytest.fixture(scope="module")
def as_before(base, zero_prior) -> Callable[[Images], bool]:
    """Whether a generator draws, with an archive and without weights, what others draw that know of no step-distilled LoRA."""
    cases = [(NAMED, zero_prior.archive), (PLAIN, None)]
    expected = [Images(base)(*case) for case in cases]
    return lambda drawer: all(np.array_equal(drawer(*case), image) for case, image in zip(cases, expected, strict=True))


@pytest.mark.parametrize(("scale", "steps"), [(0.6, 50), (1.0, 2), (None, 50)])
def test_the_image_is_that_of_stock_diffusers_with_both_loras(scale, steps, draw, base, published, zero_prior):
    prompt = PLAIN.prompt if scale is None else NAMED.prompt
    archive = None if scale is None else zero_prior.archive
    asked = replace(FAST, prompt=prompt, negative_prompt="blurry", lora_scale=scale or 1.0, steps=steps)
    found = draw(asked, archive)
    pipeline = stock_pipeline(base.source)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(PUBLISHED_SCHEDULER)
    if archive:
        apply_archive(pipeline, archive)
    pipeline.load_lora_weights(str(published.parent), weight_name=NAME, adapter_name="lightning")
    names, scales = (["subject", "lightning"], [scale, 1.0]) if archive else (["lightning"], [1.0])
    pipeline.set_adapters(names, scales)
    image = pipeline(
        prompt=prompt,
        true_cfg_scale=1.0,
        num_inference_steps=min(steps, STEPS),
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(PLAIN.seed),
    ).images[0]
    # Ours adds a LoRA's output by one addmm, PEFT in two operations: on some processors single pixels are rounded otherwise.
    other = draw(replace(asked, go_fast=False), archive)
    differs, without = (np.mean(np.asarray(drawn) != found) for drawn in (image, other))
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 1 and differs < 0.01 < 0.1 < without


def test_it_is_off_again_bit_for_bit(draw, zero_prior, baseline, as_before):
    for before in ((FAST, None), (FAST_NAMED, zero_prior.archive), (FAST_NAMED, baseline.archive)):
        first = draw(*before)
        assert as_before(draw)
        assert np.array_equal(draw(*before), first)
    draw(FAST_NAMED, zero_prior.archive)
    assert as_before(draw)


def test_the_lora_scale_is_the_users_alone(draw, zero_prior):
    fast_alone = draw(FAST)
    assert np.array_equal(draw(replace(FAST, lora_scale=0.0), zero_prior.archive), fast_alone)
    assert not np.array_equal(draw(replace(FAST, lora_scale=1.0), zero_prior.archive), fast_alone)
    assert not np.array_equal(draw(PLAIN), fast_alone)


def test_guidance_and_negative_prompt_do_not_count_and_the_log_says_so(draw, monkeypatch):
    monkeypatch.setattr(draw.generator.pipeline.transformer, "enable_cache", lambda _: pytest.fail("blocks would be skipped"))
    images = [draw(replace(FAST, guidance=guidance, negative_prompt=text)) for guidance, text in ((4.0, ""), (9.0, "blurry"))]
    assert np.array_equal(*images)
    said = f"go_fast: step-distilled LoRA {NAME}, at most 3 steps; guidance and the negative prompt are not used"
    assert said in draw.log and sum("/3 [" in line for line in draw.log) == 3
    draw(replace(FAST, steps=2))
    assert sum("/2 [" in line for line in draw.log) == 2
    draw(PLAIN)
    assert not any("go_fast" in line for line in draw.log)


def test_two_archives_and_the_fast_lora_go_together(draw, zero_prior, style, as_before):
    both = draw(replace(FAST_NAMED, extra_lora_scale=0.5), zero_prior.archive, style)
    doubled = draw(replace(FAST_NAMED, lora_scale=1.5), zero_prior.archive)
    assert np.abs(both.astype(int) - doubled.astype(int)).max() <= 1  # sums in another order
    assert not np.array_equal(both, draw(FAST_NAMED, zero_prior.archive))
    assert as_before(draw)


def test_an_interruption_anywhere_leaves_no_trace(base, fast, zero_prior, as_before):
    drawer = Images(base, fast)
    short, with_archive = replace(PLAIN, steps=1), (replace(FAST, steps=1), zero_prior.archive)
    interrupt_anywhere(drawer, CHANGING, (short, None), with_archive, "apply", lambda: as_before(drawer))
    interrupt_anywhere(drawer, CHANGING, with_archive, (short, None), "remove", lambda: as_before(drawer))


def test_offloading_changes_no_pixel(draw, base, fast, zero_prior, as_before):
    cases = [(FAST_NAMED, zero_prior.archive), (FAST, None)]
    expected = [draw(*case) for case in cases]
    offloading = Images(WatchedBase.of(base, frees=[1]), fast)
    assert offloading.log[0].count("offloaded") == 2
    for _ in range(2):
        assert all(np.array_equal(offloading(*case), image) for case, image in zip(cases, expected, strict=True))
        assert as_before(offloading)


def test_the_predictor_draws_with_the_file_that_the_variable_names(draw, base, published, zero_prior, monkeypatch, capsys):
    monkeypatch.setenv("QWEN_IMAGE_MODEL", base.source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(FAST_VARIABLE, str(published))
    predictor = Predictor()
    predictor.setup()
    size = {"width": 64, "height": 64, "seed": PLAIN.seed, "output_format": "png", "extra_lora_weights": None}
    asked = DEFAULTS | size | {"replicate_weights": zero_prior.archive}
    found = np.asarray(Image.open(predictor.predict(**asked | {"prompt": NAMED.prompt, "go_fast": True})))
    assert np.array_equal(found, draw(FAST_NAMED, zero_prior.archive))
    assert f"go_fast: step-distilled LoRA {NAME}, 3 steps, 48 tensors" in capsys.readouterr().out


def test_for_another_base_model_and_for_none_there_is_none_and_the_log_says_why(base, monkeypatch):
    log: list[str] = []
    assert line_of(None) == "go_fast: first-block cache, as no step-distilled LoRA is available"
    monkeypatch.delenv(FAST_VARIABLE, raising=False)
    assert load_fast_lora(base, log.append) is None
    monkeypatch.setenv(FAST_VARIABLE, "none")
    assert load_fast_lora(replace(base, source=DEFAULT_MODEL), log.append) is None
    assert [line.partition("(")[2] for line in log] == [
        f"{FAST_VARIABLE} is {why}), so it is the first-block cache" for why in ("not set", "none")
    ]


@dataclass(frozen=True)
class TinyQwenImage(BaseModel):
    """Qwen/Qwen-Image by name, with the shapes of the tiny base model."""

    tiny: BaseModel | None = None

    def configuration(self, kind, name):
        return self.tiny.configuration(kind, name)


@pytest.fixture
def qwen_image(base) -> BaseModel:
    return TinyQwenImage(DEFAULT_MODEL, base.device, torch.bfloat16, tiny=base)


@pytest.mark.parametrize("name", QWEN_IMAGE.published)
def test_for_qwen_image_it_is_the_published_one(name, qwen_image, published, monkeypatch):
    monkeypatch.delenv(FAST_VARIABLE, raising=False)
    asked, fetch = [], lambda *given: asked.append(given[:3]) or published
    found = load_fast_lora(replace(qwen_image, source=name), lambda line: None, fetch)
    path, _, revision = QWEN_IMAGE.published[name].distilled_lora.partition("@")
    repository, _, file = path.rpartition("/")
    assert asked == [(repository, file, revision)] and found.steps == 8 and found.name == file
    assert {value.dtype for value in found.lora.values()} == {torch.bfloat16}


def test_a_published_one_that_cannot_be_fetched_is_no_failure_a_named_one_is(base, qwen_image, monkeypatch):
    def away(*_):
        raise ValueError("the hub is away")

    monkeypatch.delenv(FAST_VARIABLE, raising=False)
    log: list[str] = []
    assert load_fast_lora(qwen_image, log.append, away) is None
    assert log == ["Warning: go_fast has no step-distilled LoRA, so it is the first-block cache: the hub is away"]
    monkeypatch.setenv(FAST_VARIABLE, "some/model/sub/lora-4steps.safetensors@v1")
    with pytest.raises(ValueError, match=f"^{FAST_VARIABLE} cannot be used: the hub is away$"):
        load_fast_lora(base, log.append, away)


def test_a_hubs_file_and_a_url_are_read(base, published, site, monkeypatch):
    (address, folder), asked = site, []
    (folder / "x-5step.safetensors").write_bytes(published.read_bytes())
    for source, steps in (("some/model/sub/lora_4_steps.safetensors@v1", 4), (f"{address}/x-5step.safetensors?token=1", 5)):
        monkeypatch.setenv(FAST_VARIABLE, source)
        found = load_fast_lora(base, lambda line: None, lambda *given: asked.append(given[:3]) or published)
        assert found.steps == steps
    assert asked == [("some/model", "sub/lora_4_steps.safetensors", "v1")]


@pytest.mark.parametrize(
    ("name", "found"),
    [(f"Qwen-Image-Lightning-4steps-{version}.safetensors", 4) for version in ("V1.0", "V2.0-bf16")]
    + [("Qwen-Image-2512-Lightning-8steps-V1.0-fp32.safetensors", 8)],
)
def test_a_name_tells_the_number_of_steps_or_it_is_asked_for(name, found):
    assert steps_of(name) == found
    for unclear in ("lora.safetensors", "4steps-or-8steps.safetensors", "8stepson.safetensors", "1000steps"):
        with pytest.raises(ValueError, match=f"{unclear} does not say for how many steps .* or set {STEPS_VARIABLE}$"):
            steps_of(unclear)
    with pytest.raises(ValueError, match="give a whole number from 1 to 200"):
        steps_of("lora-0steps.safetensors")


def test_a_number_of_steps_that_is_none_stops_the_start_whatever_the_lora(base, monkeypatch):
    monkeypatch.setenv(STEPS_VARIABLE, "many")
    published = replace(base, source=DEFAULT_MODEL)
    with pytest.raises(ValueError, match=f"^{STEPS_VARIABLE} is 'many': give a whole number from 1 to 200"):
        load_fast_lora(published, print, lambda *_: pytest.fail("it was fetched"))


WRONG = {
    "no such file": (None, "is neither a file nor a URL nor owner/name/file.safetensors@revision"),
    "not safetensors": (lambda tensors: b"PK archive", "is not a safetensors file"),
    "another model": (
        lambda tensors: save({key.replace("blocks.1", "blocks.9"): value for key, value in tensors.items()}),
        "the LoRA does not fit: this base model has no linear layer 'transformer_blocks.9",
    ),
    "no LoRA": (lambda tensors: save({"proj_out.weight": torch.ones(2, 2)}), "which is no weight of a LoRA"),
    "half of it": (
        lambda tensors: save({key: value for key, value in tensors.items() if "lora_up" not in key}),
        "an alpha for .* without both of its weights",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_gets_its_sentence_before_any_weights_are_loaded(case, base, published, tmp_path, monkeypatch):
    made, sentence = WRONG[case]
    path = tmp_path / NAME
    if made:
        path.write_bytes(made(load_file(published)))
    monkeypatch.setenv(FAST_VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"^{FAST_VARIABLE} cannot be used: .*({sentence})"):
        load_fast_lora(WithoutWeights(base.source, base.device, base.dtype), print)

"""An archive on a stock pipeline: the images of our own prediction, and nothing left of it afterwards."""

import copy

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImagePipeline
from safetensors.torch import save

import placeholder
from placeholder.generate import ImageGenerator
from placeholder.pipeline import learned_rows
from placeholder.request import Request
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import encode_prompts, prompt_ids
from placeholder.weights.archive import LORA_NAME, Weights, read_weights, write_weights
from tests.support.samples import read_zip, write_zip
from tests.support.stock import apply_archive, stock_pipeline

SETTINGS = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "np"}
PROMPT, NEGATIVE = "a photo of <zwx>, <zwx>!", "blurry <zwx>"
SEVERAL = ["<zwx>", "a longer prompt that names no token", "a photo of <zwx> in a garden"]


@pytest.fixture(scope="module")
def pristine(base) -> QwenImagePipeline:
    """The stock pipeline, which no test changes."""
    return stock_pipeline(base.source, two_dimensional_vae=False)


@pytest.fixture
def pipe(pristine) -> QwenImagePipeline:
    """A stock pipeline of the test's own, but for the tokenizer, which nobody may change."""
    return copied(pristine, pristine.tokenizer)


def copied(pristine: QwenImagePipeline, tokenizer) -> QwenImagePipeline:
    """The same pipeline with weights of its own."""
    parts = {name: copy.deepcopy(part) for name, part in pristine.components.items() if name != "tokenizer"}
    found = QwenImagePipeline(**parts, tokenizer=tokenizer)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def vectors(zero_prior, tmp_path_factory):
    """The archive with three vectors for its token, and a second token of two."""
    trained = read_weights(zero_prior.archive)
    width = trained.embeddings["<zwx>"].shape[1]
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0)) * 0.02
    ids = {"<zwx>": [151665, 151666, 151667], "<qrs>": [151668, 151669]}
    path = tmp_path_factory.mktemp("vectors") / "vectors.zip"
    write_weights(
        path, Weights(trained.lora, {"<zwx>": rows[:3], "<qrs>": rows[3:]}, trained.meta | {"placeholder_token_ids": ids}), {}
    )
    return path


def images(pipe: QwenImagePipeline, prompt=PROMPT, negative=NEGATIVE, **options) -> np.ndarray:
    """Images in [0, 1], (B, H, W, 3)."""
    options = {"true_cfg_scale": 4.0} | SETTINGS | options
    return pipe(prompt=prompt, negative_prompt=negative, generator=torch.Generator().manual_seed(7), **options).images


@pytest.fixture(scope="module")
def generator(base) -> ImageGenerator:
    """Our own prediction."""
    return ImageGenerator(base, lambda line: None)


def state(pipe: QwenImagePipeline) -> dict:
    """All that could be left behind: weights, module types, hooks, the tokenizer, the pipeline's own attributes."""
    modules = {
        f"{name}.{path}": (
            type(module),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            "forward" in vars(module),
        )
        for name in ("text_encoder", "transformer")
        for path, module in getattr(pipe, name).named_modules()
    }
    tokenizer = (len(pipe.tokenizer), pipe.tokenizer("a <zwx>").input_ids, id(pipe.tokenizer))
    return {"modules": modules, "tokenizer": tokenizer, "attributes": sorted(vars(pipe))}


def same_weights(pipe: QwenImagePipeline, other: QwenImagePipeline) -> bool:
    """Whether text encoder and transformer hold the same bits under the same names."""
    pairs = [(getattr(pipe, name).state_dict(), getattr(other, name).state_dict()) for name in ("text_encoder", "transformer")]
    return all(
        found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        for found, expected in pairs
    )


@pytest.mark.parametrize("archive", ["one vector", "several vectors", "scale", "baseline"])
def test_the_image_is_the_one_of_our_own_prediction(archive, pipe, generator, zero_prior, baseline, vectors):
    path = {"several vectors": vectors, "baseline": baseline.archive}.get(archive, zero_prior.archive)
    scale = 1.7 if archive == "scale" else 1.0
    placeholder.load(pipe, str(path), lora_scale=scale)
    request = Request(prompt=PROMPT, negative_prompt=NEGATIVE, steps=3, width=64, height=64, seed=7, lora_scale=scale)
    expected = np.asarray(generator.generate(request, path)) / 255
    found = images(pipe)
    assert np.abs(found[0] - expected).max() <= 1.01 / 255
    placeholder.unload(pipe)
    assert np.abs(images(pipe)[0] - expected).max() > 2 / 255  # so that equal is not what anything would be


def test_embeddings_equal_our_own_encoding_with_several_vectors_and_tokens(pipe, text_encoder, tokenizer, vectors):
    placeholder.load(pipe, vectors)
    embeddings = read_weights(vectors).embeddings
    tokens = PlaceholderTokens(len(tokenizer), embeddings, text_encoder.embed_tokens.embedding_dim)
    for prompt in ("<zwx>", "a <qrs> beside a <zwx><zwx>", "no token"):
        found, mask = pipe.encode_prompt(prompt)
        with torch.no_grad():
            expected = encode_prompts(text_encoder, tokens, torch.tensor([prompt_ids(tokenizer, tokens, prompt)]))
        assert mask is None
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_embeddings_equal_those_of_a_token_that_is_really_registered(pipe, pristine, zero_prior):
    registered = copied(pristine, copy.deepcopy(pristine.tokenizer))
    apply_archive(registered, zero_prior.archive)
    placeholder.load(pipe, zero_prior.archive)
    with torch.no_grad():
        for prompt in (PROMPT, "no token", SEVERAL):
            (found, mask), (expected, expected_mask) = pipe.encode_prompt(prompt), registered.encode_prompt(prompt)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert (mask is None) == (expected_mask is None)
            assert mask is None or torch.equal(mask, expected_mask)
        for prompt in ("", "a cat", ["a cat", "two cats and a dog"]):  # encoded by the pipeline, bit for bit
            assert torch.equal(pipe.encode_prompt(prompt)[0], pristine.encode_prompt(prompt)[0])


def test_lists_of_prompts_and_several_images_a_prompt(pipe, zero_prior):
    placeholder.load(pipe, zero_prior.archive)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    options = SETTINGS | {"true_cfg_scale": 1.0}
    together = pipe(prompt=SEVERAL, generator=generators, **options).images
    alone = [
        pipe(prompt=text, generator=torch.Generator().manual_seed(n), **options).images[0] for n, text in enumerate(SEVERAL)
    ]
    assert np.abs(together - np.stack(alone)).max() < 2 / 255
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    twice = pipe(prompt=SEVERAL[0], num_images_per_prompt=2, generator=generators, **options).images
    assert np.abs(twice - alone[0]).max() < 2 / 255


@pytest.mark.parametrize("run", ["zero_prior", "baseline"])
def test_only_the_lora_and_one_method_differ_and_unload_brings_all_back_bit_for_bit(run, pipe, pristine, request):
    plain, before = images(pipe), state(pipe)
    placeholder.unload(pipe)  # nothing is loaded: nothing happens
    placeholder.load(pipe, request.getfixturevalue(run).archive)
    assert not np.array_equal(images(pipe), plain)
    loaded = state(pipe)
    assert loaded["tokenizer"] == before["tokenizer"]
    assert set(loaded["attributes"]) - set(before["attributes"]) == {"_get_qwen_prompt_embeds"}
    for name, module in before["modules"].items():
        assert not name.startswith("text_encoder") or loaded["modules"][name] == module
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, pristine.text_encoder.get_input_embeddings().weight)
    placeholder.unload(pipe)
    assert same_weights(pipe, pristine)
    assert state(pipe) == before
    assert np.array_equal(images(pipe), plain)


def test_a_gated_lora_is_not_fused_and_a_fused_one_not_unloaded(pipe, zero_prior):
    plain = images(pipe)
    placeholder.load(pipe, zero_prior.archive)
    gated = images(pipe)
    for safe in (False, True):
        with pytest.raises(ValueError, match="a LoRA with a token gate cannot be fused: load it again, with"):
            pipe.fuse_lora(safe_fusing=safe)
    assert np.array_equal(images(pipe), gated)
    placeholder.load(pipe, zero_prior.archive, token_gate=False)
    open_ = images(pipe)
    pipe.fuse_lora()
    assert np.abs(images(pipe) - open_).max() < 1e-3
    for change in (placeholder.unload, lambda pipe: placeholder.load(pipe, zero_prior.archive)):
        with pytest.raises(ValueError, match=r"the LoRA is fused into the weights: pipe\.unfuse_lora\(\) first"):
            change(pipe)
    pipe.unfuse_lora()
    placeholder.unload(pipe)
    assert np.abs(images(pipe) - plain).max() < 1e-3


def test_a_transformer_that_torch_compile_has_wrapped_gets_its_sentence(pipe, zero_prior):
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="torch.compile has wrapped the transformer: load first, or compile with pipe"):
        placeholder.load(pipe, zero_prior.archive)


def test_a_second_load_replaces_the_first(pipe, zero_prior, baseline, vectors):
    placeholder.load(pipe, baseline.archive)
    alone = images(pipe)
    placeholder.load(pipe, vectors, lora_scale=0.5)
    assert not np.array_equal(images(pipe), alone)
    placeholder.load(pipe, baseline.archive)
    assert np.array_equal(images(pipe), alone)


@pytest.mark.parametrize("loaded", [False, True], ids=["bare", "loaded"])
def test_bad_weights_leave_the_pipeline_as_it_was(loaded, pipe, zero_prior, tmp_path):
    module = "transformer.transformer_blocks.9.attn.to_q"
    foreign = save({f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)})
    wide = save({"qwen25_7b": torch.ones(1, 3584)})
    entries = read_zip(zero_prior.archive)
    bad = {
        "the LoRA does not fit": write_zip(tmp_path / "lora.zip", entries | {LORA_NAME: foreign}),
        "this base model takes": write_zip(tmp_path / "row.zip", entries | {"embeddings/zwx.safetensors": wide}),
        "are not a file": tmp_path / "none.zip",
    }
    if loaded:
        placeholder.load(pipe, zero_prior.archive, lora_scale=1.5)
    before = images(pipe)
    for sentence, path in bad.items():
        with pytest.raises(ValueError, match=sentence):
            placeholder.load(pipe, path)
        assert np.array_equal(images(pipe), before), sentence
    with pytest.raises(ValueError, match="lora_scale is nan: give a number from -3.0 to 3.0"):
        placeholder.load(pipe, zero_prior.archive, lora_scale=float("nan"))
    assert np.array_equal(images(pipe), before)


def test_another_lora_beside_ours_stays_and_one_before_ours_is_refused(pipe, zero_prior, style):
    placeholder.load(pipe, zero_prior.archive)
    pipe.load_lora_weights(style, adapter_name="other")
    pipe.set_adapters(["default", "other"], [1.0, 0.5])
    images(pipe)
    placeholder.unload(pipe)
    assert pipe.get_active_adapters() == ["other"]
    with pytest.raises(ValueError, match="the pipeline already has the LoRA 'other'"):
        placeholder.load(pipe, zero_prior.archive)
    pipe.unload_lora_weights()
    placeholder.load(pipe, zero_prior.archive)


# With the CPU as the accelerator too: the hooks are the same.
OFFLOADING = {
    "models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "groups": lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("first", [False, True], ids=["offloaded, then loaded", "loaded, then offloaded"])
@pytest.mark.parametrize("kind", OFFLOADING)
def test_an_offloaded_pipeline_generates_the_same_and_comes_back(kind, first, pipe, pristine, zero_prior):
    plain = images(pipe)
    placeholder.load(pipe, zero_prior.archive)
    expected = images(pipe)
    if first:
        OFFLOADING[kind](pipe)
    else:
        placeholder.unload(pipe)
        OFFLOADING[kind](pipe)
        images(pipe)
        placeholder.load(pipe, zero_prior.archive)
    assert np.array_equal(images(pipe), expected)
    placeholder.unload(pipe)
    assert np.array_equal(images(pipe), plain)
    assert same_weights(pipe, pristine)


def test_pipelines_that_cannot_be_used_get_their_sentence(pipe, zero_prior):
    with pytest.raises(ValueError, match="the pipeline is a QwenImageImg2ImgPipeline: give a QwenImagePipeline"):
        placeholder.load(QwenImageImg2ImgPipeline(**pipe.components), zero_prior.archive)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"instead of enable_sequential_cpu_offload\(\)"):
        placeholder.load(pipe, zero_prior.archive)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="the pipeline has no text_encoder"):
        placeholder.load(pipe, zero_prior.archive)


def test_weights_of_another_base_are_a_warning(pipe, zero_prior):
    pipe.register_to_config(_name_or_path="Qwen/Other")
    with pytest.warns(UserWarning, match="applied to Qwen/Other"):
        placeholder.load(pipe, zero_prior.archive)


def test_it_works_in_bf16_and_the_rows_follow_the_embedding_to_its_device(pipe, zero_prior):
    pipe.to(torch.bfloat16)
    placeholder.load(pipe, zero_prior.archive)
    assert np.isfinite(images(pipe)).all()
    assert pipe.encode_prompt("<zwx>")[0].dtype == torch.bfloat16
    embedding = torch.nn.Embedding(4, 8, device="meta")
    tokens = PlaceholderTokens(4, {"<a>": torch.ones(1, 8)}, 8)
    with learned_rows(embedding, tokens):
        assert embedding(torch.tensor([[1, 4]], device="meta")).device.type == "meta"
    assert tokens.rows.device.type == "meta"


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = placeholder.lode

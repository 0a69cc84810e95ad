"""The base model's components: how they are loaded, and that pictures are encoded as the pipeline does it."""

import numpy as np
import pytest
import torch
from torchao.quantization import Int8Tensor

from placeholder.model.base import DEFAULT_MODEL, DEFAULT_REVISION, BaseModel
from placeholder.model.loading import load_text_encoder, load_transformer, load_vae
from placeholder.model.vae import encode_image
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import encode_prompts, prompt_ids
from tests.support.samples import picture
from tests.support.stock import stock_pipeline

NO_TOKENS = PlaceholderTokens(151665, {}, 32)


@pytest.fixture(scope="module")
def stock(base):
    """The whole base model in a stock pipeline."""
    return stock_pipeline(base.source)


@pytest.fixture(scope="module")
def vae(base):
    return load_vae(base, torch.float32)


def test_an_encoded_picture_comes_back_through_the_pipelines_denormalization(stock, vae):
    pixels = torch.from_numpy(np.array(picture(96, 64))).permute(2, 0, 1)
    packed = encode_image(vae, pixels)
    assert (packed.shape, packed.dtype) == ((4 * 6, 64), torch.float32)
    # As QwenImagePipeline.__call__ does it before it decodes.
    latents = stock._unpack_latents(packed[None], 64, 96, stock.vae_scale_factor)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    raw = vae.encode(pixels[None, :, None] / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, raw, rtol=1e-4, atol=1e-5)
    assert raw.std() > 0


def test_a_picture_is_scaled_as_the_pipelines_image_processor_does_it(stock):
    expected = stock.image_processor.preprocess(picture())
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    torch.testing.assert_close(pixels[None] / 127.5 - 1, expected, rtol=0, atol=1e-6)


def test_everything_is_loaded_frozen_and_the_vocabulary_is_not_resized(base, text_encoder, vae):
    for module in (text_encoder, vae, load_transformer(base)):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert text_encoder.embed_tokens.weight.shape == (152064, 32)
    assert not hasattr(text_encoder, "lm_head")
    assert not any("visual" in name for name, _ in text_encoder.named_modules())


def test_a_quantized_text_encoder_is_stored_in_8_bits_and_encodes_nearly_the_same(base, text_encoder, tokenizer):
    quantized = load_text_encoder(base, quantize=True)
    linear = [module for module in quantized.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    assert all(isinstance(module.weight, Int8Tensor) for module in linear)
    ids = torch.tensor([prompt_ids(tokenizer, NO_TOKENS, "a photo of a cat")])
    with torch.no_grad():
        expected, found = (encode_prompts(encoder, NO_TOKENS, ids) for encoder in (text_encoder, quantized))
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < 0.05


def test_the_base_model_is_the_one_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("QWEN_IMAGE_MODEL", "some/folder")
    assert BaseModel.from_environment() == BaseModel("some/folder", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BaseModel.from_environment() == BaseModel("some/folder", torch.device("cuda"), torch.bfloat16)
    for empty in (lambda: monkeypatch.setenv("QWEN_IMAGE_MODEL", ""), lambda: monkeypatch.delenv("QWEN_IMAGE_MODEL")):
        empty()
        assert BaseModel.from_environment().source == DEFAULT_MODEL == "Qwen/Qwen-Image"
        assert BaseModel.from_environment().revision == DEFAULT_REVISION
    monkeypatch.setenv("QWEN_IMAGE_MODEL", "Qwen/Qwen-Image@main")
    assert BaseModel.from_environment().revision == "main"


def test_a_revision_stands_behind_an_at_sign(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for revision in ("v1.0", "refs/pr/7", "0123456789abcdef0123456789abcdef01234567"):
        monkeypatch.setenv("QWEN_IMAGE_MODEL", f"some/model@{revision}")
        found = BaseModel.from_environment()
        assert (found.source, found.revision) == ("some/model", revision)
    folder = tmp_path / "base@home"
    folder.mkdir()
    monkeypatch.setenv("QWEN_IMAGE_MODEL", str(folder))
    assert BaseModel.from_environment().source == str(folder)


@pytest.mark.parametrize(
    "name", ["some/model@", "some/model@a b", "some/model@../x", "some/model@-x", "@v1", "a/b/c@v1", "a/b@c@d"]
)
def test_a_malformed_revision_gets_its_sentence(name, monkeypatch):
    monkeypatch.setenv("QWEN_IMAGE_MODEL", name)
    with pytest.raises(
        ValueError, match="is not a folder and not owner/name@revision: give a commit, a tag or a branch behind"
    ):
        BaseModel.from_environment()


def test_the_full_size_model_without_a_gpu_gets_its_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("QWEN_IMAGE_MODEL", raising=False)
    with pytest.raises(
        ValueError, match="no CUDA GPU was found and Qwen/Qwen-Image needs one: run on a GPU, or name a small model"
    ):
        BaseModel.from_environment()

"""The parts of pretraining on the smallest model: padded prompts, the optimizer, crops, and a run that was stopped."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from placeholder.training.flow import add_noise
from standin import denoiser, pretrain
from standin.denoiser import Batches, Denoiser
from standin.pool import CAPTIONS, MAX_IDS, Pool
from standin.small_base import TINY_SIZE, new_components

IMAGES, SIDE = 8, 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Pool:
    """Captions of random ids, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 120, (IMAGES, CAPTIONS, MAX_IDS), generator=generator)
    lengths = torch.randint(40, 56, (IMAGES, CAPTIONS), generator=generator)
    return Pool(torch.zeros(IMAGES, 3, 128, 128, dtype=torch.uint8), ids, lengths, ids[0, 0], 40)


def new(data: Pool) -> tuple[Denoiser, Batches]:
    model = Denoiser(new_components(TINY_SIZE, seed=0), data, compiled=False)
    return model, Batches(data, torch.randn(IMAGES, 16, 64, generator=torch.Generator().manual_seed(1)), model.used, CPU)


@torch.no_grad()
def test_a_prompt_beside_longer_ones_gives_what_it_gives_alone(data):
    model, batches = new(data)
    positions, lengths, clean, noise, sigmas = (part[:4] for part in batches.draw(0))
    assert len(lengths.unique()) > 1
    noisy = add_noise(clean, noise, sigmas)
    together = model(positions, lengths, noisy, sigmas)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model(positions[one, :length], lengths[one], noisy[one], sigmas[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_attention_is_that_of_diffusers(data):
    model, batches = new(data)
    positions, lengths, clean, _, sigmas = (part[:1] for part in batches.draw(0))
    inputs = positions[:, : lengths[0]], lengths, clean, sigmas
    found = model(*inputs)
    model.transformer.set_attn_processor(QwenDoubleStreamAttnProcessor2_0())
    model.text_encoder.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(data, tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "SAVE_EVERY", 2)
    monkeypatch.setattr(denoiser, "BATCH", 4)
    monkeypatch.setattr(denoiser, "STAGES", {SIDE: 4})

    def weights(path) -> list[torch.Tensor]:
        model, batches = new(data)
        denoiser.train(model, batches, SIDE, path)
        return [parameter.detach() for parameter in model.parameters()]

    whole = weights(tmp_path / "whole.pt")
    kept = denoiser.Run.keep

    def stop(run: denoiser.Run) -> None:
        kept(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(denoiser.Run, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "stopped.pt")
    monkeypatch.setattr(denoiser.Run, "keep", kept)
    assert torch.load(tmp_path / "stopped.pt", weights_only=True)["step"] == 2
    assert all(torch.equal(one, other) for one, other in zip(whole, weights(tmp_path / "stopped.pt"), strict=True))
    start, _ = new(data)
    assert any(not torch.equal(one, other) for one, other in zip(whole, start.parameters(), strict=True))


def test_crops_are_whole_images_made_smaller_and_parts_of_images(data):
    image = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
    image[:, :, ::2] = 255  # stripes, which vanish where an image is made smaller
    found = pretrain.crops(image, 0.5, torch.Generator().manual_seed(0))
    assert found.shape == (4, 3, 64, 64)
    assert found[:2].abs().max() < 0.01 and found[2:].abs().min() == 1
    assert pretrain.crops(image, 0.0, torch.Generator().manual_seed(0)).abs().min() == 1


def test_images_are_encoded_once(tmp_path, monkeypatch):
    encoded: list[tuple] = []

    def encode(*asked) -> torch.Tensor:
        encoded.append(asked)
        return torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)

    monkeypatch.setattr(pretrain, "FOLDER", tmp_path)
    monkeypatch.setattr(pretrain, "encode", encode)
    first, again = (pretrain.kept_latents(None, None, SIDE, CPU) for _ in range(2))
    assert torch.equal(first, again) and len(encoded) == 1

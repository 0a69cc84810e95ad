"""Masks: black parts are not learned."""

import numpy as np
import pytest
import torch
from PIL import Image

from placeholder.config import TrainConfig
from placeholder.data.dataset import read_dataset
from placeholder.training.context import Context
from placeholder.training.examples import draw_sample
from placeholder.training.flow import flow_loss
from placeholder.training.losses import sample_losses
from placeholder.training.setup import prepare
from tests.support.samples import encoded, picture, write_zip


def half(width: int = 64, height: int = 64) -> Image.Image:
    """White on the left, black on the right."""
    return Image.fromarray(np.repeat(np.where(np.arange(width) < width // 2, 255, 0)[None], height, axis=0).astype(np.uint8))


def entries(**more: bytes) -> dict[str, bytes]:
    """Two images, of which the first has a mask."""
    return {"a.png": encoded(picture(seed=1)), "b.png": encoded(picture(seed=2)), "a.mask.png": encoded(half())} | {
        name.replace("__", "."): content for name, content in more.items()
    }


def test_a_mask_gives_the_tokens_of_its_image_their_weights(tmp_path):
    (first, second), report = read_dataset(write_zip(tmp_path / "d.zip", entries()), (64,))
    assert (first.name, second.name) == ("a.png", "b.png")
    assert first.weights[0].tolist() == [1.0, 1.0, 0.0, 0.0] * 4
    assert second.weights is None
    assert report.masks == 1 and report.images == 2 and not report.skipped
    assert report.lines()[0].endswith("2 filled in with default_caption, 1 masks")


def test_what_is_transparent_in_a_mask_is_not_learned(tmp_path):
    layer = Image.new("RGBA", (64, 64), "white")
    layer.putalpha(half())  # white paint on a transparent layer
    weights = []
    for mask in (half(), layer):
        (photo, _), _ = read_dataset(write_zip(tmp_path / "d.zip", entries() | {"a.mask.png": encoded(mask)}), (64,))
        weights += photo.weights
    assert torch.equal(*weights) and set(weights[0].tolist()) == {0.0, 1.0}


def test_a_mask_is_cropped_as_its_image_is(tmp_path):
    wide = {"a.jpg": encoded(picture(320, 64), "JPEG"), "a.mask.png": encoded(half(320, 64))}
    ((photo,), _) = read_dataset(write_zip(tmp_path / "d.zip", wide), (64,))
    (cut,), (weights,) = photo.crops, photo.weights
    height, width = cut.shape[1] // 16, cut.shape[2] // 16
    assert width > 2
    expected = torch.cat([torch.ones(height, width // 2), torch.zeros(height, width // 2)], dim=1).flatten()
    torch.testing.assert_close(weights, expected, atol=0.02, rtol=0)


def test_a_masked_half_has_no_part_in_the_loss_and_the_rest_counts_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    found, target = torch.randn(2, 8, 4, generator=generator), torch.randn(2, 8, 4, generator=generator)
    weights = torch.tensor([[1.0] * 4 + [0.0] * 4, [1.0] * 8])
    losses = flow_loss(found, target, weights)
    torch.testing.assert_close(losses[0], (found[0, :4] - target[0, :4]).square().mean())
    torch.testing.assert_close(losses[1], flow_loss(found, target)[1])
    changed = found.clone()
    changed[0, 4:] += 100
    assert torch.equal(flow_loss(changed, target, weights), losses)


def test_the_training_weights_the_loss_by_the_mask(base, tmp_path):
    config = TrainConfig(steps=1, rank=4, resolution=(64,), seed=1, caption_dropout=0.0)
    training = prepare(write_zip(tmp_path / "d.zip", entries()), Context(config, base, lambda _: None))
    sampler, denoiser = training.state.sampler, training.state.denoiser
    masked, plain = sampler.examples
    assert plain.weights is None
    sample = draw_sample(masked, sampler.empty_ids, 0.0, torch.Generator().manual_seed(0))
    other = draw_sample(plain, sampler.empty_ids, 0.0, torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    denoiser.transformer.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    together = sample_losses(denoiser, training.prompt_embeds, [sample, other])
    errors = (seen[0] - torch.stack([sample.noise - masked.latents, other.noise - plain.latents])).square().mean(dim=2)
    torch.testing.assert_close(together[0], errors[0][masked.weights == 1].mean())
    torch.testing.assert_close(together[1], errors[1].mean())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"a__mask__png": encoded(half(96, 64))}, "mask a.mask.png is 96x64 pixels, its image 64x64: give the same size"),
        ({"a__mask__png": encoded(Image.new("L", (64, 64)))}, "mask a.mask.png is black where its image is cropped to 64x64"),
        ({"a__mask__png": b"no image"}, "mask a.mask.png cannot be read .*: save it again, or leave it out"),
        ({"a__mask__jpg": encoded(half(), "JPEG")}, "two masks of one image, 'a.mask.jpg' and 'a.mask.png'"),
    ],
)
def test_a_mask_that_does_not_fit_gets_its_sentence(more, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        read_dataset(write_zip(tmp_path / "d.zip", entries(**more)), (64,))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("photo.jpg", "photo.jpg.mask.png"),
        ("Photo.jpg", "photo.MASK.png"),
        ("photo.jpg", "photo-masklabel.png"),
        ("e\u0301.jpg", "e\u0301.jpg.mask.png"),  # as macOS writes names
        ("\xe9.jpg", "e\u0301.jpg.mask.png"),
    ],
)
def test_masks_are_found_by_other_spellings_of_their_images_name(image, mask, tmp_path):
    files = {image: encoded(picture(), "JPEG"), mask: encoded(half())}
    (photo,), report = read_dataset(write_zip(tmp_path / "d.zip", files), (64,))
    assert photo.weights is not None and report.masks == 1 and not report.skipped


def test_masks_that_are_not_used_and_folders_of_other_trainers_are_warned_about(tmp_path):
    files = {"10_dog/a.png": encoded(picture()), "3_cat/b.png": encoded(picture()), "masks/a.png": encoded(half())}
    files |= {"c.mask.png": encoded(half()), "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": encoded(picture(), "JPEG")}
    files |= dict.fromkeys(("$RECYCLE.BIN/x.png",), encoded(picture()))
    photos, report = read_dataset(write_zip(tmp_path / "d.zip", files), (64,))
    assert [photo.file for photo in photos] == ["10_dog/a.png", "3_cat/b.png", "masks/a.png"]
    assert report.skipped == {"c.mask.png": "a mask without an image of that name"}
    assert [line for line in report.lines() if line.startswith("Warning")] == [
        "Warning: 1 masks are of no image and not used: c.mask.png",
        "Warning: 1 images that look like masks, control or class images by their names are trained like all others: "
        "masks/a.png",
        "Warning: the numbers in front of folder names are no repeats here: every crop is trained equally often",
    ]


@pytest.mark.parametrize(
    ("file", "warned"),
    [
        *((file, True) for file in ("a_mask.png", "a-condlabel.PNG", "a_depth.png", "Class_Images/b.png", "reg/imgs/b.png")),
        *((file, False) for file in ("b_mask.png", "adepth.png", "region/b.png", "maskedball/b.png", "masks/b.npz")),
    ],
)
def test_images_that_other_trainers_do_not_train_as_the_subject_are_warned_about(file, warned, tmp_path):
    files = {"a.png": encoded(picture()), file: b"numbers" if file.endswith(".npz") else encoded(picture())}
    photos, report = read_dataset(write_zip(tmp_path / "d.zip", files), (64,))
    assert len(photos) == 2 - file.endswith(".npz")
    assert any("masks, control or class images" in line for line in report.lines()) == warned

"""The distilled LoRA of the small base model: how it is made, and the images of the one that ships."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from placeholder.generate import ImageGenerator
from placeholder.lora.adapter import load_lora
from placeholder.lora.distilled import FAST_VARIABLE, load_fast_lora
from placeholder.model.loading import load_transformer
from placeholder.weights.archive import read_weights
from standin import distil
from standin.check_base import caption, held_out_scenes, right_shares
from standin.sampler import GUIDANCE
from standin.world import SIDE
from study.measures import difference
from tests.support.predictions import PLAIN

COUNT, GRID = 6, SIDE // 16  # images; tokens of a side


@pytest.fixture(scope="module")
def paths(base) -> distil.Paths:
    """Where the teacher, which is untrained, was on its way to six images."""
    return distil.teach(base, load_transformer(base), COUNT, seed=1)


def test_the_teachers_latents_are_kept_at_the_students_sigmas(paths, base):
    assert paths.latents.shape == (distil.STUDENT_STEPS + 1, COUNT, GRID**2, 64)
    scheduler = distil.fast_scheduler(base)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / distil.STUDENT_STEPS, distil.STUDENT_STEPS).tolist(), mu=1.0986123)
    torch.testing.assert_close(paths.sigmas, scheduler.sigmas)


def test_a_path_does_not_depend_on_the_longer_prompts_beside_it(paths, base, monkeypatch):
    monkeypatch.setattr(distil, "PATHS_AT_ONCE", 1)
    alone = distil.teach(base, load_transformer(base), COUNT, seed=1)
    assert len(set(paths.mask.sum(1).tolist())) > 1
    torch.testing.assert_close(alone.latents, paths.latents, rtol=1e-3, atol=1e-3)


def velocity(transformer, paths: distil.Paths) -> torch.Tensor:
    with torch.no_grad():
        return transformer(
            hidden_states=paths.latents[0],
            timestep=paths.sigmas[:1].repeat(COUNT),
            encoder_hidden_states=paths.embeds,
            encoder_hidden_states_mask=paths.mask,
            img_shapes=[[(1, GRID, GRID)]] * COUNT,
            return_dict=False,
        )[0]


def test_the_student_learns_and_its_file_is_what_it_was(paths, base, tmp_path):
    student = load_transformer(base)
    losses = [loss for _, loss in islice(distil.distil(student, paths, steps=60, seed=0), 60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    path = tmp_path / "lora-8steps.safetensors"
    distil.save(student, path)
    loaded = load_transformer(base)
    load_lora(loaded, read_weights(path).lora)
    learned, again, before = velocity(student, paths), velocity(loaded, paths), velocity(load_transformer(base), paths)
    assert (again - learned).norm() < 0.02 * (learned - before).norm()  # stored in bf16


def test_the_one_that_ships_shows_what_captions_ask_for_in_its_steps(small_base, monkeypatch):
    assert distil.STORED.stat().st_size < 3e6
    monkeypatch.setenv(FAST_VARIABLE, str(distil.STORED))
    generator = ImageGenerator(small_base, lambda line: None, load_fast_lora(small_base, lambda line: None))
    scenes = held_out_scenes(12, seed=11)
    prompts = [caption(scene.things[0], scene.background) for scene in scenes]

    def images(**options) -> list[list[Image.Image]]:
        sized = replace(PLAIN, width=SIDE, height=SIDE, **options)
        requests = [replace(sized, prompt=prompt, seed=number) for number, prompt in enumerate(prompts)]
        return [[generator.generate(request, None)] for request in requests]

    fast, unguided = images(go_fast=True), images(steps=distil.STUDENT_STEPS, guidance=1.0)
    guided = images(steps=distil.STUDENT_STEPS * distil.SUBSTEPS, guidance=GUIDANCE)
    shares = right_shares([image for (image,) in fast], scenes)
    assert shares["background"] >= 0.9 and shares["color"] >= 0.85 and shares["shape"] >= 0.6, shares
    assert difference(fast, guided) < 0.8 * difference(unguided, guided)

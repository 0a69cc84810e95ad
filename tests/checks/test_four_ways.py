"""The parts of make four-ways: the example for diffusers makes our image, and the documents state what was found."""

import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from checks.comfyui_vae import vae_name
from checks.four_ways import FOUR, OURS, TOLERANCE, differences, from_file, table
from checks.four_ways_ours import deltas, documented_example, predictor, recording
from demo.run import IMAGE
from demo.server import ROOT
from placeholder.model.base import MODEL_VARIABLE
from placeholder.model.loading import load_vae
from tests.support.samples import read_zip

PROMPT = "a photo of <zwx> in a garden"


def test_the_example_for_diffusers_makes_the_image_of_predict(base, zero_prior, tmp_path, monkeypatch):
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    records, pictures = [], []
    for number, generate in enumerate(
        (predictor(zero_prior.archive), documented_example(zero_prior.archive, base.source, tmp_path))
    ):
        with recording() as seen, redirect_stdout(None):
            generate(PROMPT, tmp_path / f"{number}.png")
        embeds, negative = seen["embeds"]
        record = {"prompt.0": embeds, "negative": negative, "latents.0": seen["latents"]}
        records.append(record | {f"delta.{name}": value for name, value in deltas(seen["pipeline"].transformer).items()})
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png"), dtype=int))
    found = differences(*records, std=torch.ones(16))
    assert max(found["conditioning"], found["lora"]) <= TOLERANCE
    assert found["latents"] <= 1e-4
    assert pictures[0].shape == (IMAGE["height"], IMAGE["width"], 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1

    (tmp_path / "lora_weights.safetensors").write_bytes(read_zip(zero_prior.archive)["lora/lora_weights.safetensors"])
    updates = from_file(tmp_path)
    assert all(torch.allclose(records[0][name], update, atol=1e-6) for name, update in updates.items())
    assert sum(bool(update.any()) for update in updates.values()) >= len(updates) - 2  # nothing is learned behind the last text


def test_records_that_do_not_hold_the_same_are_an_error():
    record = {
        "prompt.0": torch.zeros(1, 3, 2),
        "negative": torch.zeros(1),
        "delta.a": torch.ones(2, 2),
        "latents.0": torch.ones(1),
    }
    shorter = record | {"prompt.0": torch.zeros(1, 2, 2)}
    without = {name: value for name, value in record.items() if name != "delta.a"}
    for other in (shorter, without):
        with pytest.raises(AssertionError):
            differences(record, other, torch.ones(16))


def test_every_weight_of_the_vae_has_another_name_in_comfyui(small_base):
    vae = load_vae(small_base, torch.float32)
    names = {vae_name(name, vae.config.num_res_blocks + 1) for name in vae.state_dict()}
    assert len(names) == len(vae.state_dict())
    assert {
        "conv1.weight",
        "conv2.bias",
        "decoder.upsamples.2.time_conv.weight",
        "decoder.upsamples.3.shortcut.weight",
        "decoder.upsamples.10.residual.6.weight",
        "decoder.middle.1.to_qkv.weight",
        "decoder.head.0.gamma",
        "encoder.downsamples.6.residual.0.gamma",
        "encoder.downsamples.5.time_conv.bias",
    } <= names


def test_the_documents_state_what_was_found():
    found = json.loads((ROOT / "docs" / "four-ways.json").read_text())
    document = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert table(found["ways"]) in document
    assert f"ComfyUI {found['versions']['comfyui']}" in document
    assert f"over the {found['lora_layers']} layers" in " ".join(document.split())
    gated = [found["ways"][way][name] for way in FOUR if way != OURS for name in ("conditioning", "lora")]
    assert max(gated) <= TOLERANCE == found["tolerance"]
    assert f"by at most {max(gated):.1e}".replace("e-0", "e-") in " ".join(document.split())
    assert max(found["ways"][way]["pixels"] for way in FOUR) == 1

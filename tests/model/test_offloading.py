"""Prediction on cards of several sizes: what is offloaded, and that offloading changes no pixel."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.full_size import RandomBase
from placeholder.generate import ImageGenerator
from placeholder.model.loading import load_text_encoder
from placeholder.model.offloading import Streamed, stream
from placeholder.model.placement import Placement, Sizes, place, placement_of
from placeholder.request import Request
from placeholder.transformer.checkpointing import saved_bytes
from tests.support.bases import WatchedBase

REQUEST = Request(prompt="a photo of <zwx>", steps=2, width=64, height=64, seed=3)
FULL_SIZE = RandomBase("Qwen-Image with random weights", torch.device("cuda"), torch.bfloat16)  # counted alone


@pytest.mark.parametrize(
    ("gigabytes", "offloaded"), [(80, (0, 0)), (56, (22, 0)), (48, (28, 0)), (40, (28, 18)), (24, (28, 39))]
)
def test_the_full_size_model_is_placed_on_the_cards_that_people_have(gigabytes, offloaded):
    """Counted, not measured on such cards: layers of the text encoder and blocks of the transformer that are offloaded."""
    found = placement_of(FULL_SIZE, gigabytes * 10**9)
    assert (found.text_encoder, found.transformer) == offloaded
    assert "transformer (40.9 GB)" in found.line and "text encoder (13.1 GB)" in found.line


def test_a_tenth_of_the_memory_stays_free():
    assert place(Sizes(50, 5, 10), Sizes(40, 4, 10), 100)[:2] == (0, 0)
    assert place(Sizes(50, 5, 10), Sizes(41, 4, 10), 100)[:2] == (10, 0)
    assert place(Sizes(90, 9, 10), Sizes(40, 4, 10), 100)[:2] == (10, 10)


@pytest.mark.parametrize("free", [0, "half"])
def test_offloading_changes_no_pixel(base, zero_prior, baseline, free, monkeypatch):
    """With room for half the layers, and for none: base model, an archive, another one, the first again."""

    def images(generator: ImageGenerator) -> list[np.ndarray]:
        archives = (None, zero_prior.archive, baseline.archive, zero_prior.archive)
        requests = [replace(REQUEST, prompt="a photo") if archive is None else REQUEST for archive in archives]
        return [np.asarray(generator.generate(*both)) for both in zip(requests, archives, strict=True)]

    plain = ImageGenerator(base, log=lambda line: None)
    models = (plain.text_encoder.layers, plain.pipeline.transformer.transformer_blocks)
    offloaded = tuple(len(layers) // 2 if free else len(layers) for layers in models)
    with monkeypatch.context() as patch:
        patch.setattr("placeholder.generate.placement_of", lambda *_: Placement(*offloaded, "placed"))
        offloading = ImageGenerator(base, lambda line: None)
    blocks = offloading.pipeline.transformer.transformer_blocks
    assert [isinstance(block.forward, Streamed) for block in blocks[::-1]] == [n < offloaded[1] for n in range(len(blocks))]
    expected, found = images(plain), images(offloading)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not np.array_equal(expected[1], expected[2]) and np.array_equal(expected[1], expected[3])


def test_a_streamed_layer_gives_the_same_gradients_and_keeps_no_weight(base):
    """Its weights are a part of one vector in host memory; autograd keeps its input alone."""
    layers = load_text_encoder(base).layers
    streamed = copy.deepcopy(layers)
    stream(streamed, torch.device("cpu"))
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    options = {"position_embeddings": (torch.ones(2, 7, 16), torch.zeros(2, 7, 16)), "attention_mask": None}
    found = [some[1](hidden, **options) for some in (layers, streamed)]
    gradients = [torch.autograd.grad(one.square().sum(), hidden)[0] for one in found]
    assert torch.equal(*found) and torch.equal(*gradients)
    (storage,) = {parameter.untyped_storage().data_ptr() for parameter in streamed.parameters()}
    assert storage == streamed[1].forward.weights.untyped_storage().data_ptr()
    assert all(torch.equal(*both) for both in zip(layers.parameters(), streamed.parameters(), strict=True))
    tables = options["position_embeddings"]
    assert saved_bytes(lambda: streamed[1](hidden, **options), tables) == hidden.nbytes
    assert saved_bytes(lambda: layers[1](hidden, **options), (*tables, *layers.parameters())) > 2 * hidden.nbytes


@pytest.mark.parametrize(("frees", "lines"), [([], 0), ([0], 1)])
def test_a_prediction_decodes_in_tiles_where_the_image_does_not_fit_and_says_so(base, frees, lines):
    log: list[str] = []
    request = replace(REQUEST, prompt="a photo", width=320, height=288, steps=1)
    ImageGenerator(WatchedBase.of(base, frees=frees), log.append).generate(request, None)
    assert sum("decoding 320x288 pixels" in line and line.endswith("in tiles") for line in log) == lines

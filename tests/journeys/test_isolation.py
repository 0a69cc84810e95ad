"""Nothing of a request is seen in the next: interrupted anywhere, out of memory, cancelled through the server."""

import io
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load, save

from demo.server import CogServer, data_url, from_data_url
from placeholder.model.offloading import Streamed
from placeholder.request import Request
from placeholder.weights.applied import INCOMPLETE
from tests.support.bases import WatchedBase
from tests.support.interruption import CHANGING, Interruption, interrupt_anywhere, raising
from tests.support.predictions import NAMED, PLAIN, Images
from tests.support.samples import read_zip, write_zip

ROW = "embeddings/zwx.safetensors"
FAST = replace(NAMED, steps=3, go_fast=True)
SHORT, SHORT_NAMED = replace(PLAIN, steps=2), replace(NAMED, steps=2)


@pytest.fixture(scope="module")
def other(zero_prior, tmp_path_factory) -> Path:
    """The archive with another row for the same token."""
    entries = read_zip(zero_prior.archive)
    rows = {name: -3 * value for name, value in load(entries[ROW]).items()}
    return write_zip(tmp_path_factory.mktemp("other") / "weights.zip", entries | {ROW: save(rows)})


@pytest.fixture(scope="module")
def cases(zero_prior, other) -> list[tuple[Request, Path | None]]:
    """Requests that show what another one left behind."""
    return [(SHORT, None), (FAST, zero_prior.archive), (SHORT_NAMED, other)]


@pytest.fixture(scope="module")
def expected(base, cases) -> list[np.ndarray]:
    """The images of generators that have done nothing before."""
    return [Images(base)(*case) for case in cases]


@pytest.fixture(scope="module")
def images(base) -> Images:
    """The generator that is disturbed."""
    return Images(base)


@pytest.fixture
def as_fresh(images, cases, expected):
    """Whether each of the requests gets its image."""
    return lambda: all(np.array_equal(images(*case), image) for case, image in zip(cases, expected, strict=True))


def test_an_interruption_anywhere_while_weights_and_cache_are_applied(images, cases, as_fresh):
    interrupt_anywhere(images, CHANGING, cases[0], cases[1], "register_hook", as_fresh)


def test_an_interruption_anywhere_while_weights_are_removed(images, cases, as_fresh):
    interrupt_anywhere(images, CHANGING, cases[1], (replace(SHORT, go_fast=True), None), "remove", as_fresh)


def test_an_interruption_anywhere_while_two_archives_are_applied(images, cases, zero_prior, style, as_fresh):
    interrupt_anywhere(images, CHANGING, cases[2], (SHORT_NAMED, zero_prior.archive, style), "load_lora", as_fresh)


def test_an_interruption_anywhere_while_an_offloaded_transformer_gets_weights(base, cases, expected):
    offloaded = Images(WatchedBase.of(base, frees=[1]))
    assert offloaded.log[0].count("offloaded") == 2

    def as_fresh() -> bool:
        same = all(np.array_equal(offloaded(*cases[number]), expected[number]) for number in (0, 2))
        blocks = offloaded.generator.pipeline.transformer.transformer_blocks
        return same and all(isinstance(block.forward, Streamed) for block in blocks)

    interrupt_anywhere(offloaded, CHANGING, cases[0], cases[2], "_compute", as_fresh)


@pytest.mark.parametrize(
    ("before", "after", "function", "number", "event"),
    [
        ("plain", "named", "load_lora", 1, "return"),
        ("plain", "both", "load_lora", 1, "return"),
        ("plain", "both", "load_lora", 2, "return"),
        ("named", "switched", "overwrite_lora", 1, "return"),
        ("named", "plain", "PeftAdapterMixin.unload_lora", 1, "call"),
        ("named", "plain", "AppliedWeights._reset", 1, "call"),
    ],
)
def test_an_interruption_between_two_changes_is_undone_by_the_next_request(
    before, after, function, number, event, images, zero_prior, baseline, style, as_fresh
):
    requests = {
        "plain": (SHORT, None),
        "named": (SHORT_NAMED, zero_prior.archive),
        "both": (SHORT_NAMED, zero_prior.archive, style),
        "switched": (SHORT_NAMED, baseline.archive),
    }
    images(*requests[before])
    with pytest.raises(Interruption), raising(function, Interruption(), number, event):
        images(*requests[after])
    assert images.generator.weights.applied == INCOMPLETE
    assert as_fresh()


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
ON_A_CPU = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    ("function", "number", "error"),
    [
        ("read_weights", 1, MemoryError()),
        ("PlaceholderTokens.__init__", 1, OUT_OF_MEMORY),
        ("encode_prompts", 2, OUT_OF_MEMORY),
        ("PeftAdapterMixin.load_lora_adapter", 1, OUT_OF_MEMORY),
        ("BaseTunerLayer._move_adapter_to_device_of_base_layer", 9, OUT_OF_MEMORY),
        ("CacheMixin.enable_cache", 1, ON_A_CPU),
        ("QwenDoubleStreamAttnProcessor2_0.__call__", 4, OUT_OF_MEMORY),
        ("AutoencoderKLQwenImage.decode", 1, ON_A_CPU),
    ],
)
def test_running_out_of_memory_gets_its_sentence_and_leaves_no_trace(function, number, error, images, cases, as_fresh):
    images(*cases[0])
    images.forget()
    with pytest.raises(RuntimeError, match="memory.*: give a smaller width and height"), raising(function, error, number):
        images(*cases[1])
    assert as_fresh()


def test_two_archives_with_the_same_token_never_share_an_embedding(images, cases, expected, zero_prior, other, tmp_path):
    copy = tmp_path / "copy.zip"
    copy.write_bytes(other.read_bytes())
    alone = images(SHORT_NAMED, zero_prior.archive)
    assert not np.array_equal(alone, expected[2])
    for archive, image in ((other, expected[2]), (zero_prior.archive, alone), (copy, expected[2]), (other, expected[2])):
        assert np.array_equal(images(SHORT_NAMED, archive), image)
    encoded = images.generator.prompt_embeds.cache_info().misses
    images(SHORT_NAMED, copy)
    assert images.generator.prompt_embeds.cache_info().misses == encoded


def test_cancelled_at_random_moments_the_server_goes_on_as_if_undisturbed(base, cases, expected, tmp_path):
    choose = random.Random(1)
    size = {"guidance": 4, "width": 64, "height": 64, "seed": 7, "output_format": "png", "token_gate": False}
    inputs = [
        {"prompt": request.prompt, **size, "steps": request.steps, "go_fast": request.go_fast}
        | ({"replicate_weights": data_url(archive)} if archive else {})
        for request, archive in cases
    ]
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def ours() -> list[str]:
        return [path.name for path in temporary.iterdir() if path.name.startswith("placeholder-")]

    environment = {"QWEN_IMAGE_MODEL": base.source, "TMPDIR": str(temporary)}
    with CogServer("predict", environment, tmp_path / "server.log") as server:
        server.ask(inputs[0])
        start = time.monotonic()
        server.ask(inputs[0] | {"steps": 200})
        whole = time.monotonic() - start  # an image that is finished cannot be cancelled
        over = 0
        for number in range(4):
            server.start(f"cancelled-{number}", inputs[number % 3] | {"steps": 200, "go_fast": False})
            time.sleep(choose.uniform(0, whole / 2))
            try:
                server.cancel(f"cancelled-{number}")
            except requests.HTTPError as error:  # on a machine that has become faster since the image was timed
                assert error.response.status_code == 404
                over += 1
            start = time.monotonic()
            while requests.get(f"{server.url}/health-check", timeout=5).json()["status"] != "READY":
                assert time.monotonic() - start < 10  # other tests run beside this one
                time.sleep(0.02)
            assert ours() == []
            answer = server.ask(inputs[(number + 1) % 3])
            assert answer["status"] == "succeeded", answer
            found = np.asarray(Image.open(io.BytesIO(from_data_url(answer["output"]))))
            assert np.array_equal(found, expected[(number + 1) % 3])
    assert ours() == [] and over < 2

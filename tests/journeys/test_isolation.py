"""Nothing of a request is seen in the next: interrupted anywhere, out of memory, cancelled through the server."""

import io
import random
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load, save

from demo.server import CogServer, data_url, from_data_url
from placeholder import generate as generate_module
from placeholder.generate import save_image
from placeholder.model import placement as placement_module
from placeholder.request import Request
from placeholder.weights.archive import LORA_NAME
from predict import OUTPUT
from tests.support.samples import read_zip, write_zip
from tests.test_generate import NAMED, PLAIN, Drawer

ROW = "embeddings/zwx.safetensors"
FAST = replace(NAMED, steps=3, go_fast=True)
SHORT, SHORT_NAMED = replace(PLAIN, steps=2), replace(NAMED, steps=2)
# Where predictions change what outlives them: ours, and what diffusers does to the transformer for us.
CHANGING = (
    "placeholder/generate.py",
    "placeholder/model/offloading.py",
    "placeholder/lora/adapter.py",
    "loaders/peft.py",
    "hooks/hooks.py",
)


class Interruption(BaseException):
    """What Cog raises between any two instructions when a prediction is cancelled."""


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
    """What generators draw that have done nothing before."""
    return [Drawer(base)(*case) for case in cases]


@pytest.fixture(scope="module")
def drawer(base) -> Drawer:
    """The generator that is disturbed."""
    return Drawer(base)


@pytest.fixture
def as_fresh(drawer, cases, expected):
    """Whether each of the requests gets its picture."""
    return lambda: all(np.array_equal(drawer(*case), picture) for case, picture in zip(cases, expected, strict=True))


class Moments:
    """The lines of `files` that a call runs through, by function; `stop_at` raises at one of them."""

    def __init__(self, files: tuple[str, ...], stop_at: int | None = None):
        self.files = files
        self.stop_at = stop_at
        self.passed: list[CodeType] = []

    def __call__(self, frame: FrameType, event: str, _: object):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        if len(self.passed) == self.stop_at:
            sys.settrace(None)
            raise Interruption
        self.passed.append(frame.f_code)
        return self

    def run(self, *call) -> dict[CodeType, list[int]]:
        """Make the call; the moments of each function."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call[0](*call[1:])
        finally:
            sys.settrace(before)
        found = defaultdict(list)
        for number, code in enumerate(self.passed):
            found[code].append(number)
        return found


def interrupt_anywhere(draw: Drawer, files: tuple[str, ...], before, request, closely: str, as_fresh) -> None:
    """Interrupt the request in some functions of the files, and four times near the end of those called `closely`."""
    choose = random.Random(0)

    def begin() -> None:
        draw(*before)
        draw.generator.archives.clear()
        draw.generator.embeddings.cache_clear()

    begin()
    moments = Moments(files).run(draw, *request)
    chosen = [choose.choice(found) for found in choose.sample(list(moments.values()), 6)]
    (close,) = (found for code, found in moments.items() if code.co_name == closely)
    for moment in (*chosen, *close[-8::2]):
        begin()
        with pytest.raises(Interruption):
            Moments(files, moment).run(draw, *request)
        assert as_fresh(), moment


def test_an_interruption_anywhere_while_weights_and_cache_are_put_on(drawer, cases, as_fresh):
    interrupt_anywhere(drawer, CHANGING, cases[0], cases[1], "register_hook", as_fresh)


def test_an_interruption_anywhere_while_weights_are_taken_off(drawer, cases, as_fresh):
    interrupt_anywhere(drawer, CHANGING, cases[1], (replace(SHORT, go_fast=True), None), "unload", as_fresh)


def test_an_interruption_anywhere_while_a_streamed_transformer_gets_weights(base, cases, expected, monkeypatch):
    monkeypatch.setattr(placement_module, "free_bytes", lambda device: 1)
    streaming = Drawer(base)
    assert streaming.generator.streamed
    files = ("hooks/group_offloading.py", "hooks/hooks.py", "placeholder/model/offloading.py")

    def as_fresh() -> bool:
        same = all(np.array_equal(streaming(*cases[number]), expected[number]) for number in (0, 2))
        layers = (m for m in streaming.generator.pipeline.transformer.modules() if isinstance(m, torch.nn.Linear))
        return same and all(layer._diffusers_hook.get_hook("group_offloading") for layer in layers)

    interrupt_anywhere(streaming, files, cases[0], cases[2], "remove_hook", as_fresh)


def test_an_interruption_anywhere_while_two_archives_are_put_on(drawer, cases, zero_prior, as_fresh, tmp_path):
    style = tmp_path / "style.safetensors"
    style.write_bytes(zero_prior.entry(LORA_NAME))
    both = (SHORT_NAMED, zero_prior.archive, style)
    interrupt_anywhere(drawer, CHANGING, cases[2], both, "load_lora", as_fresh)


def fail_at(number: int, error: Exception, original):
    """The function, which raises in its n-th call."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*args, **kwargs)

    return failing


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
ON_A_CPU = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    ("place", "name", "number", "error"),
    [
        ("module", "read_weights", 1, MemoryError()),
        ("module", "PlaceholderTokens", 1, OUT_OF_MEMORY),
        ("module", "encode_prompts", 2, OUT_OF_MEMORY),
        ("transformer", "load_lora_adapter", 1, OUT_OF_MEMORY),
        ("transformer.transformer_blocks.1.attn.to_q", "_move_adapter_to_device_of_base_layer", 1, OUT_OF_MEMORY),
        ("transformer", "enable_cache", 1, ON_A_CPU),
        ("transformer.transformer_blocks.1.attn.processor", "__call__", 4, OUT_OF_MEMORY),
        ("vae", "decode", 1, ON_A_CPU),
    ],
)
def test_running_out_of_memory_gets_its_sentence_and_leaves_no_trace(
    place, name, number, error, drawer, cases, as_fresh, monkeypatch
):
    drawer(*cases[0])
    drawer.generator.archives.clear()
    drawer.generator.embeddings.cache_clear()
    target = generate_module
    if place != "module":
        target = drawer.generator.pipeline
        for part in place.split("."):
            target = getattr(target, part)
    if name.startswith("_"):  # looked up in the class: at every layer, and before any is wrapped
        from peft.tuners.lora import LoraLayer

        target = LoraLayer if name.startswith("_move") else type(target)
    monkeypatch.setattr(target, name, fail_at(number, error, getattr(target, name)))
    with pytest.raises(RuntimeError, match="out of memory: give a smaller width and height"):
        drawer(*cases[1])
    monkeypatch.undo()
    assert as_fresh()


def test_a_picture_that_cannot_be_saved_leaves_nothing(drawer, cases, as_fresh, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    image = drawer.generator.generate(*cases[1])
    monkeypatch.setattr(Image.Image, "save", fail_at(1, Interruption(), Image.Image.save))
    with pytest.raises(Interruption), OUTPUT.fresh() as folder:
        save_image(image, SHORT, folder)
    assert list(tmp_path.iterdir()) == []
    assert as_fresh()


def test_two_archives_with_the_same_token_never_share_an_embedding(drawer, cases, expected, zero_prior, other, tmp_path):
    copy = tmp_path / "copy.zip"
    copy.write_bytes(other.read_bytes())
    alone = drawer(SHORT_NAMED, zero_prior.archive)
    assert not np.array_equal(alone, expected[2])
    for archive, picture in ((other, expected[2]), (zero_prior.archive, alone), (copy, expected[2]), (other, expected[2])):
        assert np.array_equal(drawer(SHORT_NAMED, archive), picture)
    encoded = drawer.generator.embeddings.cache_info().misses
    drawer(SHORT_NAMED, copy)
    assert drawer.generator.embeddings.cache_info().misses == encoded


def test_cancelled_at_random_moments_the_server_goes_on_as_if_undisturbed(base, cases, expected, tmp_path):
    choose = random.Random(1)
    size = {"guidance": 4, "width": 64, "height": 64, "seed": 7, "output_format": "png"}
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
        whole = time.monotonic() - start  # a picture that is over cannot be cancelled
        over = 0
        for number in range(10):
            server.start(f"cancelled-{number}", inputs[number % 3] | {"steps": 200, "go_fast": False})
            time.sleep(choose.uniform(0, whole / 2))
            try:
                server.cancel(f"cancelled-{number}")
            except requests.HTTPError as error:  # on a machine that has become faster since the picture was timed
                assert error.response.status_code == 404
                over += 1
            start = time.monotonic()
            while requests.get(f"{server.url}/health-check", timeout=5).json()["status"] != "READY":
                assert time.monotonic() - start < 6  # other tests run beside this one
                time.sleep(0.02)
            assert ours() == []
            answer = server.ask(inputs[(number + 1) % 3])
            assert answer["status"] == "succeeded", answer
            drawn = np.asarray(Image.open(io.BytesIO(from_data_url(answer["output"]))))
            assert np.array_equal(drawn, expected[(number + 1) % 3])
    assert ours() == [] and over < 5

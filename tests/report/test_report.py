"""The report in the archive: what it shows, that it changes nothing else, and that what is missing is said."""

import csv
import io
from dataclasses import MISSING, fields, replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from placeholder.config import TrainConfig, read_yaml, train_config
from placeholder.finetune import Stop, StoppedError, finetune
from placeholder.job import CheckpointFolder, Job
from placeholder.report import samples as samples_module
from placeholder.report.page import Contents, page
from placeholder.report.report import config_yaml, curve_csv
from placeholder.training import setup as prepare_module
from placeholder.training.progress import Point
from placeholder.weights.archive import LORA_NAME, read_weights
from placeholder.weights.metadata import TIME_VARIABLE
from tests.conftest import SHORT
from tests.support.samples import Run, read_zip, train, write_dataset, write_zip

HOSTILE = "<script>alert('x')</script> & \u202eزوكس"
TOKEN = TrainConfig(
    **SHORT | {"report": True, "steps": 6}, train_placeholder_token=True, placeholder_token=("<zwx>",), sample_every=2
)
ROWS = "embeddings/zwx.safetensors"


@pytest.fixture(autouse=True, scope="module")
def quick(tokenizer):
    """The session's tokenizer, and pictures of two denoising steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "load_tokenizer", lambda _base: tokenizer)
        patch.setattr(samples_module, "STEPS", 2)
        patch.setattr(samples_module, "STEPS_A_CAPTION", 1)  # as in a long training
        yield


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A data set whose captions and names would be code on a careless page, with a file that is no picture."""
    path = write_dataset(tmp_path_factory.mktemp("data") / "data.zip", [f"a photo of <zwx> {HOSTILE}", "<zwx> in a garden"])
    return write_zip(path, read_zip(path) | {"<b>notes.pdf": b"text"})


@pytest.fixture(scope="module")
def shown(quick, hostile, base, tmp_path_factory) -> Run:
    """A training with a token, samples and a report."""
    return train(hostile, TOKEN, tmp_path_factory.mktemp("shown") / "weights.zip", base)


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(run: Run) -> Page:
    return Page(run.entry("report/index.html").decode())


def test_the_archive_shows_the_training_and_is_read_without_the_report(shown, base):
    entries = read_zip(shown.archive)
    assert list(entries) == [
        ROWS,
        LORA_NAME,
        "meta.json",
        "report/config.yaml",
        "report/curve.csv",
        "report/curve.png",
        "report/dataset/001.jpg",
        "report/dataset/002.jpg",
        "report/grid.jpg",
        "report/index.html",
        *(f"report/samples/step-{step:06}-{number}.jpg" for step in (2, 4, 6) for number in (1, 2)),
    ]
    assert list(read_weights(shown.archive).embeddings) == ["<zwx>"]
    for name, content in entries.items():
        if name.endswith(("jpg", "png")):
            Image.open(io.BytesIO(content)).load()
    page = page_of(shown)
    images = {f"report/{attributes['src']}" for tag, attributes in page.elements if tag == "img"}
    assert images == {name for name in entries if name.endswith(("jpg", "png"))}
    assert not {"script", "b", "link", "iframe", "zwx"} & {tag for tag, _ in page.elements}
    assert all(":" not in (attributes.get("href") or "") for _, attributes in page.elements)
    for text in (
        f"a photo of <zwx> {HOSTILE}",
        "<b>notes.pdf",
        "not a jpg, png or webp image",
        base.source,
        "The base model is a small one of ",
        "Nearest to <zwx>: ",
        "expected at the height",
    ):
        assert text in page.text
    for part in ("load", "data set", "cache", "samples", "steps", "pictures", "save"):
        assert part in page.text


def test_the_page_fits_a_phone_and_a_dark_browser_and_describes_its_pictures(shown):
    text = shown.entry("report/index.html").decode()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "//" not in text.split("<style>")[1].split("</style>")[0], "the style loads nothing"
    described = {str(found["src"]): found["alt"] for tag, found in Page(text).elements if tag == "img"}
    assert described["grid.jpg"].endswith("from left to right: base model; LoRA, token reset; LoRA and token")
    assert described["samples/step-000004-2.jpg"] == "<zwx> in a garden, step 4"
    assert all(alt for name, alt in described.items() if not name.startswith("dataset/"))  # whose captions stand beside them


def test_a_title_is_plain_text_in_any_script():
    empty = {field.name: [] for field in fields(Contents) if field.default is MISSING and field.default_factory is MISSING}
    texts = {"title": "Training of <猫>", "drawing": "", "grid": None, "curve": "curve.png", "config": ""}
    dictionaries = {name: {} for name in ("facts", "samples", "data_set", "skipped")}
    text = page(Contents(**empty | texts | dictionaries))
    assert "<title>Training of &lt;猫&gt;</title>" in text
    assert "<h1><bdi>Training of &lt;猫&gt;</bdi></h1>" in text


def test_the_curve_holds_every_progress_line(shown):
    rows = list(csv.DictReader(io.StringIO(shown.entry("report/curve.csv").decode())))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    lines = [line for line in shown.log if "/6 [" in line]
    assert all(f"loss={float(row['loss']):.4f}" in line for row, line in zip(rows, lines, strict=True))
    assert [bool(row["preservation"]) for row in rows] == [False, False, False, True, False, False]
    assert all(float(row["row_norm"]) > 0 for row in rows)
    assert curve_csv([Point(1, 0.25, None, None)]) == "step,loss,preservation,row_norm\n1,0.25,,\n"


def test_samples_and_report_leave_the_training_as_it_is_bit_for_bit(shown, hostile, base, tmp_path):
    plain = train(hostile, replace(TOKEN, report=False, sample_every=0), tmp_path / "weights.zip", base)
    assert (shown.entry(LORA_NAME), shown.entry(ROWS)) == (plain.entry(LORA_NAME), plain.entry(ROWS))
    assert shown.meta["loss"] == plain.meta["loss"]
    assert not any(name.startswith("report/") for name in read_zip(plain.archive))


def test_a_baseline_has_its_report_and_is_left_as_it_is(hostile, base, tmp_path):
    config = replace(TOKEN, train_placeholder_token=False, optimizer="prodigy", steps=2, sample_every=1)
    run = train(hostile, config, tmp_path / "1.zip", base)
    plain = train(hostile, replace(config, report=False, sample_every=0), tmp_path / "2.zip", base)
    assert run.entry(LORA_NAME) == plain.entry(LORA_NAME)
    assert "The token" not in page_of(run).text
    assert "Training of a LoRA without a token" in page_of(run).text


def test_with_a_fixed_time_the_report_holds_nothing_that_was_measured(hostile, base, tmp_path, monkeypatch):
    monkeypatch.setenv(TIME_VARIABLE, "1700000000")
    config = replace(TOKEN, steps=1, sample_every=1)
    first, second = (train(hostile, config, tmp_path / name, base) for name in ("1.zip", "2.zip"))
    assert first.archive.read_bytes() == second.archive.read_bytes()
    assert "Time, in seconds" not in page_of(first).text
    assert "Memory" not in page_of(first).text


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(seed=0),
        replace(TOKEN, resolution=(512, 768), placeholder_token=("<a>", "<b>"), class_word="\x01 é: {x}", learning_rate=1e-5),
        TrainConfig(seed=5, placeholder_token=("<zwx>",), quantize=True, quantize_te=True, report=False, optimizer="prodigy"),
        TrainConfig(
            seed=4294967295, sample_prompts="a\n\nb 猫 😀\n", sample_every=5, default_caption="yes", log_prompt_ids=True
        ),
    ],
)
def test_the_configuration_can_be_given_again(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config), encoding="utf-8")
    assert train_config({}, path) == config
    others = {"steps": 3, "lora_rank": 7, "train_placeholder_token": not config.train_placeholder_token, "seed": None}
    assert train_config(others, path) == config
    assert set(read_yaml(path)) == set(vars(config))


def test_a_drawn_seed_stands_in_the_configuration(hostile, base, tmp_path):
    run = train(
        hostile, replace(TOKEN, seed=None, sample_every=0, steps=1, prior_preservation=0.0), tmp_path / "weights.zip", base
    )
    path = tmp_path / "config.yaml"
    path.write_bytes(run.entry("report/config.yaml"))
    assert train_config({}, path) == replace(run.config, seed=run.meta["seed"], torch_compile=False)


def test_pictures_for_which_the_memory_does_not_suffice_are_missing_and_the_training_is_not(
    hostile, base, tmp_path, monkeypatch
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples_module, "load_vae", full)
    run = train(hostile, replace(TOKEN, steps=2), tmp_path / "weights.zip", base)
    said = "the pictures before and after (the memory does not suffice: draw them with predict, which can stream the models)"
    assert f"Warning: not drawn for the report: {said}" in run.log
    assert f"Not drawn: {said}" in page_of(run).text
    assert "Not drawn: the samples of step 2 (the memory" in page_of(run).text
    names = read_zip(run.archive)
    assert not any("grid" in name or "samples" in name for name in names)
    assert "report/curve.png" in names


def test_a_resumed_training_has_the_whole_curve_and_the_samples_since(shown, hostile, base, tmp_path):
    stop, checkpoints = Stop(), CheckpointFolder(tmp_path / "checkpoints", 3)

    def log(line: str) -> None:
        if " 3/6 [" in line:
            stop.wanted = True

    with pytest.raises(StoppedError):
        finetune(Job(hostile, TOKEN, tmp_path / "w.zip", checkpoints=checkpoints), base, log, stop=stop)
    config, log = replace(TOKEN, sample_every=1), []
    meta = finetune(Job(hostile, config, tmp_path / "w.zip", resume_from=checkpoints.path), base, log.append)
    found = Run(config, tmp_path / "w.zip", meta, log)
    for name in (LORA_NAME, ROWS, "report/curve.csv", "report/grid.jpg", "report/samples/step-000006-1.jpg"):
        assert found.entry(name) == shown.entry(name)
    samples = {name[:26] for name in read_zip(found.archive) if "samples" in name}
    assert samples == {f"report/samples/step-{step:06}" for step in (4, 5, 6)}

"""The report in the archive: what it shows, that it changes nothing else, and that what is missing is said."""

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from placeholder.config import TrainConfig, train_config
from placeholder.data.captions import Caption
from placeholder.data.dataset import DatasetReport
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job, Stop, StoppedError
from placeholder.report.report import Report, curve_csv, render
from placeholder.report.samples import grid_prompts
from placeholder.training.context import Context
from placeholder.training.progress import Point
from placeholder.training.setup import prepare
from placeholder.weights.archive import LORA_NAME, read_weights
from placeholder.weights.metadata import TIME_VARIABLE
from tests.conftest import SHORT
from tests.support.samples import Run, read_zip, train, write_dataset, write_zip

HOSTILE = "<script>alert('x')</script> & \u202eزوكس"
TOKEN = TrainConfig(
    **SHORT | {"report": True, "steps": 6},
    train_placeholder_token=True,
    placeholder_token=("<zwx>",),
    prior_preservation=4.0,
    sample_every=3,
    sample_prompts=f"a photo of <zwx> {HOSTILE}\n<zwx> in a garden",
)
ROWS = "embeddings/zwx.safetensors"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A data set whose captions and names would be code on a careless page, with a file that is no image."""
    path = write_dataset(tmp_path_factory.mktemp("data") / "data.zip", [f"a photo of <zwx> {HOSTILE}", "<zwx> in a garden"])
    return write_zip(path, read_zip(path) | {"<b>notes.pdf": b"text"})


@pytest.fixture(scope="module")
def shown(hostile, base, tmp_path_factory) -> Run:
    """A training with a token, samples and a report."""
    return train(hostile, TOKEN, tmp_path_factory.mktemp("shown") / "weights.zip", base)


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, content: bytes):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(run: Run) -> Page:
    return Page(run.entry("report/index.html"))


def test_the_archive_has_the_report_and_is_read_without_it(shown):
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
        *(f"report/samples/step-{step:06}-{number}.jpg" for step in (3, 6) for number in (1, 2)),
    ]
    assert list(read_weights(shown.archive).embeddings) == ["<zwx>"]
    for name, content in entries.items():
        if name.endswith(("jpg", "png")):
            Image.open(io.BytesIO(content)).load()


def test_the_page_shows_everything_and_runs_nothing_that_strangers_wrote(shown, base):
    page = page_of(shown)
    images = {f"report/{attributes['src']}" for tag, attributes in page.elements if tag == "img"}
    assert images == {name for name in read_zip(shown.archive) if name.endswith(("jpg", "png"))}
    assert not {"script", "b", "link", "iframe", "zwx"} & {tag for tag, _ in page.elements}
    assert all(":" not in (attributes.get("href") or "") for _, attributes in page.elements)
    for text in (
        f"a photo of <zwx> {HOSTILE}",
        "<b>notes.pdf",
        base.source,
        "The base model is a small one of ",
        "Nearest to <zwx>: ",
        "Peak memory",
        "64x64: ",
        "<zwx>: 151665",
    ):
        assert text in page.text
    parts = re.findall(r"<th>(.+?)</th><td>\d+\.\d</td>", shown.entry("report/index.html").decode())
    assert parts == ["load", "data set", "cache", "samples", "steps", "grid", "save"]


def test_the_page_fits_a_phone_and_a_dark_browser_and_describes_its_images(shown):
    content = shown.entry("report/index.html")
    style = content.decode().split("<style>")[1].split("</style>")[0]
    assert b'<meta name="viewport" content="width=device-width, initial-scale=1">' in content
    assert "prefers-color-scheme: dark" in style
    assert "//" not in style and "url" not in style, "the style loads nothing"
    described = {str(found["src"]): found["alt"] for tag, found in Page(content).elements if tag == "img"}
    assert described["grid.jpg"].endswith("from left to right: base model; LoRA, token reset; LoRA and token")
    assert described["samples/step-000003-2.jpg"] == "<zwx> in a garden, step 3"
    assert all(alt for name, alt in described.items() if not name.startswith("dataset/"))  # their captions stand next to them


def test_a_page_has_a_thousand_captions_at_most_and_cuts_long_ones(shown):
    skipped = {f"{number}.pdf": "not an image" for number in range(203)}
    contents = {
        "title": "Training of <猫>",
        "meta": shown.meta,
        "sampling": "",
        "found": DatasetReport(1003, 1003, 0, 0, {"64x64": 1003}, skipped),
        "captions": [Caption(f"{number}.png", "猫" * 501, "file") for number in range(1003)],
        "config_yaml": "",
        "autocaption": True,
    }
    lists = ("notes", "columns", "prompts", "samples", "sample_prompts", "diagnostics", "thumbnails", "seconds", "memory")
    text = render(**dict.fromkeys(lists, ()) | contents)
    assert "<title>Training of &lt;猫&gt;</title>" in text
    assert "<h1>Training of &lt;猫&gt;</h1>" in text
    assert text.count(f"<td>{'猫' * 500}...</td>") == 1000
    assert text.count(".pdf") == 200 and text.count("and 3 more") == 2
    assert "The folder captions" in text
    assert "Before and after" not in text and "Samples while" not in text and "Time" not in text


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
    config = replace(TOKEN, train_placeholder_token=False, optimizer="prodigy", steps=2, sample_every=2, sample_prompts="a cat")
    run = train(hostile, config, tmp_path / "1.zip", base)
    plain = train(hostile, replace(config, report=False, sample_every=0), tmp_path / "2.zip", base)
    assert run.entry(LORA_NAME) == plain.entry(LORA_NAME)
    assert "The token" not in page_of(run).text
    assert "Training of a LoRA without a token" in page_of(run).text


def test_the_reports_configuration_repeats_the_archive_byte_for_byte_at_a_fixed_time(hostile, base, tmp_path, monkeypatch):
    monkeypatch.setenv(TIME_VARIABLE, "1700000000")
    config = replace(TOKEN, seed=None, steps=1, sample_every=1, sample_prompts="<zwx>")
    first = train(hostile, config, tmp_path / "1.zip", base)
    (tmp_path / "config.yaml").write_bytes(first.entry("report/config.yaml"))
    again = train_config({}, tmp_path / "config.yaml")
    assert again == replace(config, seed=first.meta["seed"], torch_compile=False)
    assert train(hostile, again, tmp_path / "2.zip", base).archive.read_bytes() == first.archive.read_bytes()
    assert first.meta["created"] == "2023-11-14T22:13:20Z"
    assert b'"modelspec.date":"2023-11-14T22:13:20Z"' in first.entry(LORA_NAME)
    assert "Time, in seconds" not in page_of(first).text
    assert "Peak memory" not in page_of(first).text


def test_samples_that_run_out_of_memory_beside_graphs_are_made_without_them(hostile, base):
    def full_at_first() -> bool:
        if training.state.passes.holds_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return False

    log: list[str] = []
    training = prepare(hostile, Context(TOKEN, base, lambda line: None), grid_prompts)
    training.state.passes._graphs["shapes"] = object()
    Report(training, Context(TOKEN, base, log.append), full_at_first).step(SimpleNamespace(number=3))
    assert [line.split(":")[0] for line in log] == ["Samples of step 3"]


def test_samples_that_run_out_of_memory_are_missing_and_the_rest_is_there(shown, hostile, base):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    log: list[str] = []
    training = prepare(hostile, Context(TOKEN, base, lambda line: None), grid_prompts)
    report = Report(training, Context(TOKEN, base, log.append), full)
    report.step(SimpleNamespace(number=3))
    report.end()
    files = report.files([Point(1, 0.5, None, None)], shown.meta, [])
    for line, what in zip(log, ("the samples of step 3", "the grid before and after"), strict=True):
        assert line.startswith(f"Warning: not sampled: {what} (") and "sample with predict" in line
        assert line.removeprefix("Warning: not sampled: ") in Page(files["report/index.html"]).text
    assert not any("grid" in name or "samples" in name for name in files)
    assert "report/curve.png" in files


def test_a_resumed_training_has_the_whole_curve_and_the_samples_since(shown, hostile, base, tmp_path):
    stop, checkpoints = Stop(), CheckpointFolder(tmp_path / "checkpoints", 3)

    def log(line: str) -> None:
        if " 3/6 [" in line:
            stop.wanted = True

    with pytest.raises(StoppedError):
        finetune(Job(hostile, TOKEN, tmp_path / "w.zip", checkpoints=checkpoints), base, log, stop=stop)
    meta = finetune(Job(hostile, TOKEN, tmp_path / "w.zip", resume_from=checkpoints.path), base, print)
    found = Run(TOKEN, tmp_path / "w.zip", meta, [])
    for name in (LORA_NAME, ROWS, "report/curve.csv", "report/grid.jpg", "report/samples/step-000006-1.jpg"):
        assert found.entry(name) == shown.entry(name)
    samples = [name for name in read_zip(found.archive) if "samples" in name]
    assert samples == [f"report/samples/step-000006-{number}.jpg" for number in (1, 2)]

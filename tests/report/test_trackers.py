"""Weights & Biases: through the real client, offline and to a server of our own; what is shown, and that nothing else is."""

import csv
import io
import json
import struct
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.job import FOLDER_VARIABLE, KEY_VARIABLE, MODE_VARIABLE, Job, WandbTarget
from placeholder.model.base import BaseModel
from placeholder.report.report import jpeg
from placeholder.report.trackers import WandbTracker
from placeholder.weights.metadata import TIME_VARIABLE
from tests.conftest import SHORT
from tests.support.samples import picture, read_zip, write_dataset
from tests.support.wandb_server import ENTITY, WandbServer, wandb_server

KEY = "0123456789" * 4
CONFIG = TrainConfig(
    **SHORT | {"report": True, "steps": 4},
    train_placeholder_token=True,
    placeholder_token=("<zwx>", "<a/b>"),
    placeholder_vectors=2,
    placeholder_warmup_fraction=0.25,
    sample_every=2,
    sample_prompts="a photo of <zwx>\n<a/b> in a garden",
)
PLAIN = replace(CONFIG, steps=2, sample_every=0, report=False, sample_prompts="")
FACTS = {"base_model": "/models/tiny-base"}


def children() -> list[psutil.Process]:
    """Every process that this one has started, however far down, and that still runs."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def around(tmp_path, monkeypatch):
    """No test leaves a process behind, or a temporary folder of its run; none sees the environment's own variables."""
    for name in (KEY_VARIABLE, MODE_VARIABLE, FOLDER_VARIABLE, "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    before, folders = children(), Path(tempfile.gettempdir())
    known = set(folders.glob("placeholder-wandb-*"))
    yield
    assert children() == before
    assert set(folders.glob("placeholder-wandb-*")) <= known


@pytest.fixture
def server(monkeypatch):
    """A W&B server on this machine that knows KEY."""
    with wandb_server(KEY) as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        yield found


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The folder of runs that stay on this machine."""
    monkeypatch.setenv(MODE_VARIABLE, "offline")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A data set of two images."""
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip", ["a photo of <zwx>", "<a/b> in a garden"])


def train(base: BaseModel, photographs: Path, config: TrainConfig, output: Path, log, target: WandbTarget | None, seconds=60.0):
    with WandbTracker(target, log, finish_seconds=seconds) as tracker:
        return finetune(Job(photographs, config, output), base, log, tracker=tracker)


def records(folder: Path) -> list[Record]:
    """What an offline run holds: LevelDB's log format, after a header of 7 bytes, with a protocol buffer in each record."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, found, record = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(record))
            record = b""
        if kind == 0 or 32768 - place % 32768 < 7:  # the rest of a block of 32 KiB is empty
            place = (place // 32768 + 1) * 32768
    return found


def items(parts) -> dict[str, Any]:
    """Keys and values of a configuration, a line of the history or a summary."""
    found: dict[str, Any] = {}
    for part in parts:
        *path, name = list(part.nested_key) or [part.key]
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[name] = json.loads(part.value_json)
    return found


def as_jpeg(content: bytes) -> bytes:
    """An image that was sent, as the archive keeps it."""
    return jpeg(Image.open(io.BytesIO(content)))


def test_an_offline_run_holds_the_training_and_neither_the_photographs_nor_the_key(
    offline, base, photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv(TIME_VARIABLE, "1700000000")
    log: list[str] = []
    meta = train(base, photographs, CONFIG, tmp_path / "shown.zip", log.append, WandbTarget.of(KEY, None, "a name", "a-team"))
    train(base, photographs, CONFIG, tmp_path / "plain.zip", print, None)
    assert (tmp_path / "shown.zip").read_bytes() == (tmp_path / "plain.zip").read_bytes()
    (folder,) = offline.glob("wandb/*")
    assert f"W&B: offline run in {folder}, which wandb sync uploads" in log

    entries, found = read_zip(tmp_path / "shown.zip"), records(offline)
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name, run.entity, run.host) == ("qwen-image-lora", "a name", "a-team", "")
    options = items(run.config.update)
    assert {name: options[name] for name in asdict(CONFIG)} == json.loads(json.dumps(asdict(CONFIG)))
    assert options["base_model"] == "tiny-base"

    lines = [items(record.history.item) for record in found if record.HasField("history")]
    curve = list(csv.DictReader(io.StringIO(entries["report/curve.csv"].decode())))
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    assert [f"{line['loss']:.6g}" for line in lines] == [row["loss"] for row in curve]
    assert f"{lines[3]['preservation']:.6g}" == curve[3]["preservation"]
    norms = [lines[3][f"row_norm/{name}/{number}"] for name in ("zwx", "a%2Fb") for number in (1, 2)]
    assert norms == [norm for token in CONFIG.tokens for norm in meta["placeholder_row_norms"][token]]
    assert [line["learning_rate/lora"] for line in lines] == [0.0, 1e-2, 1e-2, 1e-2]  # the token embeddings first learn alone
    assert lines[3]["learning_rate/token"] == pytest.approx(4e-4)

    media = {path.relative_to(folder / "files").as_posix(): path.read_bytes() for path in folder.rglob("files/**/*.png")}
    for step in (2, 4):
        sent, kept = lines[step - 1]["samples"], [entries[f"report/samples/step-{step:06}-{number}.jpg"] for number in (1, 2)]
        assert sent["captions"] == ["a photo of <zwx>", "<a/b> in a garden"]
        assert [as_jpeg(media[name]) for name in sent["filenames"]] == kept
    (grid,) = lines[3]["before_and_after"]["filenames"]
    assert as_jpeg(media[grid]) == entries["report/grid.jpg"] and len(media) == 5
    summary = {}
    for record in found:
        summary |= items(record.summary.update) if record.HasField("summary") else {}
    assert summary["diagnostics"] == meta["diagnostics"] and "dataset" not in summary
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]

    files = [path for path in offline.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".png", ".log", ".wandb"}
    content = b"".join(path.read_bytes() for path in files)
    assert KEY.encode() not in content and KEY not in "".join(log)
    assert str(photographs).encode() not in content
    (run_file,) = (path for path in files if path.suffix == ".wandb")
    assert not any(place.encode() in run_file.read_bytes() for place in (str(ROOT), str(tmp_path)))


def test_a_run_reaches_the_server_with_its_images_and_prints_nothing(server: WandbServer, tmp_path, capfd):
    log, images = [], [("a cat", picture()), ("a dog", picture(seed=1))]
    with WandbTracker(WandbTarget.of(KEY, "subjects", None, "me"), log.append) as tracker:
        tracker.start(CONFIG, FACTS)
        tracker.step(1, {"loss": 0.5})
        tracker.step(2, {"loss": 0.25}, images)
        tracker.end(2, {"images": 3, "base_model": "/models/tiny-base"})
    assert log == [f"W&B: {server.url}/{ENTITY}/subjects/runs/{server.runs[0]['name']}"]
    first = server.runs[0]
    assert (first["project"], first["entity"], first["displayName"], first["host"] or "") == ("subjects", "me", None, "")
    assert json.loads(first["config"])["rank"] == {"value": 4}
    lines = server.lines["wandb-history.jsonl"]
    assert [(line["_step"], line.get("loss")) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert lines[1]["samples"]["captions"] == ["a cat", "a dog"]
    for name, (_, image) in zip(lines[1]["samples"]["filenames"], images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(server.files[name]))), np.asarray(image))
    assert server.lines["wandb-summary.json"][-1]["images"] == 3
    assert {Path(path).suffix for path in server.files} <= {".png", ".json", ".yaml"}
    hidden = (KEY, str(ROOT), "/models", str(Path.home() / ""))
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(text.encode() in content for content in server.files.values() for text in hidden)
    assert not any(KEY.encode() in content for content in kept)
    assert capfd.readouterr() == ("", "")
    assert server.exit_codes == [0]


def test_a_cancelled_training_ends_its_run_as_failed(offline, base, photographs, tmp_path):
    def cancelled(line: str) -> None:
        if " 2/4 [" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, photographs, CONFIG, tmp_path / "w.zip", cancelled, WandbTarget.of(None, "p", None, None))
    found = records(offline)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
    assert sum(record.HasField("history") for record in found) == 1


def test_a_key_that_is_refused_is_told_before_any_weight_is_loaded(server: WandbServer, base, photographs, tmp_path):
    log, wrong = [], "9" * 40
    with pytest.raises(ValueError, match=r"the run cannot be started on W&B at http://127.*: check wandb_api_key") as error:
        train(base, photographs, PLAIN, tmp_path / "w.zip", log.append, WandbTarget.of(wrong, None, None, None))
    assert wrong not in str(error.value)
    assert log == ["Seed: 1"]
    assert server.runs == []


def test_a_server_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with (
        pytest.raises(ValueError, match=r"W&B at http://127.0.0.1:9 \(.*connection refused.*\): check wandb_api_key"),
        WandbTracker(WandbTarget.of(KEY, None, None, None), print, init_seconds=1.0) as tracker,
    ):
        tracker.start(CONFIG, FACTS)


def test_a_server_that_goes_away_costs_the_run_and_not_the_training(server: WandbServer, base, photographs, tmp_path):
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        server.gone |= " 1/2 [" in line

    train(base, photographs, PLAIN, tmp_path / "w.zip", log, WandbTarget.of(KEY, None, None, None), seconds=1.0)
    assert (tmp_path / "w.zip").exists()
    assert lines[-1] == "Warning: W&B did not take everything within 1 seconds: the run there is incomplete"


def test_a_client_that_dies_is_one_warning(offline):
    log: list[str] = []
    before = children()
    with WandbTracker(WandbTarget.of(None, "p", None, None), log.append) as tracker:
        tracker.start(CONFIG, FACTS)
        for process in [child for child in children() if child not in before]:
            process.kill()
            process.wait()
        for step in range(1, 100):
            tracker.step(step, {"loss": 1.0})
        tracker.end(99, {"loss": 1.0})
    (warning,) = log[1:]
    assert warning.startswith("Warning: W&B has failed (") and warning.endswith("): the training goes on without it")


def test_a_folder_that_cannot_be_written_gets_its_sentence(offline):
    offline.write_bytes(b"a file")
    with (
        pytest.raises(ValueError, match=r"the run cannot be started on W&B .*File exists.*: check WANDB_DIR"),
        WandbTracker(WandbTarget.of(None, "p", None, None), print) as tracker,
    ):
        tracker.start(CONFIG, FACTS)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((None, "p", None, None), "wandb_project needs a wandb_api_key, unless WANDB_MODE=offline"),
        ((None, None, "r", None), "wandb_run needs a wandb_api_key"),
        ((KEY, "a/b", None, None), "wandb_project is 'a/b': give at most 128 characters, none of"),
        ((KEY, None, "\n", None), r"wandb_run is '\\n': give at most 128 characters"),
        ((KEY, None, None, "e" * 129), "wandb_entity is 'eee.*: give at most 128 characters"),
    ],
)
def test_bad_names_get_their_sentence(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        WandbTarget.of(*inputs)


def test_a_mode_of_another_kind_gets_its_sentence(monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "shared")
    with pytest.raises(ValueError, match="WANDB_MODE is 'shared': set online or offline, or leave it unset"):
        WandbTarget.of(KEY, None, None, None)


def test_without_a_key_and_names_there_is_no_run_and_a_key_is_never_shown():
    assert WandbTarget.of(None, None, None, None) is None
    assert WandbTarget.of("", "", "", "") is None
    assert KEY not in repr(WandbTarget.of(KEY, None, None, None))

"""Weights & Biases: through the real client, offline and to a server of our own; what is shown, and that nothing else is."""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

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
from tests.support.serving import running
from tests.support.trainings import children
from tests.support.wandb_server import ENTITY, WandbServer

KEY = "0123456789" * 4
CONFIG = TrainConfig(
    **SHORT | {"report": True, "steps": 4},
    train_placeholder_token=True,
    placeholder_token=("<zwx>", "<a/b>"),
    placeholder_vectors=2,
    placeholder_warmup_fraction=0.25,
    sample_every=2,
    sample_prompts="<zwx> and <a/b>",
)
PLAIN = replace(CONFIG, steps=2, sample_every=0, report=False, sample_prompts="")
FACTS = {"base_model": "/models/tiny-base"}


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
    with running(WandbServer(KEY)) as found:
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


def train(base: BaseModel, photographs: Path, config: TrainConfig, output: Path, log, target: WandbTarget | None):
    return finetune(Job(photographs, config, output, tracker=target), base, log)


def sync(folder: Path, server: WandbServer) -> Path:
    """Upload the one offline run in the folder as the log advises, and return where it is."""
    (run,) = folder.glob("wandb/*")
    env = {name: value for name, value in os.environ.items() if name not in (MODE_VARIABLE, FOLDER_VARIABLE)}
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    subprocess.run(command, env=env | {KEY_VARIABLE: KEY}, cwd=folder.parent, check=True, timeout=120)
    return run


def test_an_offline_run_holds_the_training_and_neither_the_photographs_nor_the_key(
    offline, server: WandbServer, base, photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv(TIME_VARIABLE, "1700000000")
    log: list[str] = []
    meta = train(base, photographs, CONFIG, tmp_path / "shown.zip", log.append, WandbTarget.of(KEY, None, "a name", "a-team"))
    train(base, photographs, CONFIG, tmp_path / "plain.zip", print, None)
    assert (tmp_path / "shown.zip").read_bytes() == (tmp_path / "plain.zip").read_bytes()
    folder, entries = sync(offline, server), read_zip(tmp_path / "shown.zip")
    assert f"W&B: offline run in {folder}, which wandb sync uploads" in log

    run = server.runs[0]
    assert (run["project"], run["displayName"], run["entity"], run["host"]) == ("qwen-image-lora", "a name", "a-team", None)
    options = {name: found["value"] for name, found in json.loads(run["config"]).items()}
    resolved = json.loads(json.dumps(asdict(replace(CONFIG, torch_compile=False))))
    assert {name: options[name] for name in resolved} == resolved
    assert options["base_model"] == "tiny-base"

    lines, curve = server.lines["wandb-history.jsonl"], csv.DictReader(io.StringIO(entries["report/curve.csv"].decode()))
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    assert [(f"{line['loss']:.6g}", line.get("preservation") is None) for line in lines] == [
        (row["loss"], not row["preservation"]) for row in curve
    ]
    norms = [lines[3][f"row_norm/{name}/{number}"] for name in ("zwx", "a%2Fb") for number in (1, 2)]
    assert norms == [norm for token in CONFIG.tokens for norm in meta["placeholder_row_norms"][token]]
    assert [line["learning_rate/lora"] for line in lines] == [0.0, 1e-2, 1e-2, 1e-2]  # the token embeddings first learn alone
    assert lines[3]["learning_rate/token"] == pytest.approx(4e-4)
    summary = server.lines["wandb-summary.json"][-1]
    assert summary["diagnostics"] == meta["diagnostics"] and server.exit_codes == [0]

    for step in (2, 4):
        assert lines[step - 1]["samples"]["captions"] == ["<zwx> and <a/b>"]
        (sample,) = lines[step - 1]["samples"]["filenames"]
        assert as_jpeg(server.files[sample]) == entries[f"report/samples/step-{step:06}-1.jpg"]
    (grid,) = lines[3]["before_and_after"]["filenames"]
    assert as_jpeg(server.files[grid]) == entries["report/grid.jpg"]

    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".png" for path in files) == 3  # two samples and the grid
    assert not any(KEY.encode() in content for content in files.values())
    sent = [*server.files.values(), *(content for path, content in files.items() if path.suffix == ".wandb")]
    assert not any(str(place).encode() in content for content in sent for place in (photographs, ROOT))


def as_jpeg(content: bytes) -> bytes:
    """An image that was sent, as the archive keeps it."""
    return jpeg(Image.open(io.BytesIO(content)))


def test_a_run_reaches_the_server_with_its_images_and_prints_nothing(server: WandbServer, tmp_path, capfd):
    log: list[str] = []
    with WandbTracker(WandbTarget.of(KEY, "subjects", None, "me"), log.append) as tracker:
        tracker.start(CONFIG, FACTS)
        tracker.step(1, {"loss": 0.5})
        tracker.step(2, {"loss": 0.25}, [("a cat", picture()), ("a dog", picture(seed=1))])
        tracker.end(2, {"images": 3, **FACTS})
    assert log == [f"W&B: {server.url}/{ENTITY}/subjects/runs/{server.runs[0]['name']}"]
    lines, summary = server.lines["wandb-history.jsonl"], server.lines["wandb-summary.json"][-1]
    assert [(line["_step"], line.get("loss")) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert lines[1]["samples"]["captions"] == ["a cat", "a dog"] and set(lines[1]["samples"]["filenames"]) <= set(server.files)
    assert summary["images"] == 3 and "base_model" not in summary and server.exit_codes == [0]
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(text.encode() in content for content in server.files.values() for text in (KEY, str(ROOT), "/models"))
    assert not any(KEY.encode() in content for content in kept)
    assert capfd.readouterr() == ("", "")


def test_a_cancelled_training_ends_its_run_as_failed(offline, server: WandbServer, base, photographs, tmp_path):
    def cancelled(line: str) -> None:
        if " 2/4 [" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, photographs, CONFIG, tmp_path / "w.zip", cancelled, WandbTarget.of(None, "p", None, None))
    sync(offline, server)
    assert server.exit_codes == [1]
    assert [line["_step"] for line in server.lines["wandb-history.jsonl"]] == [1]


def test_a_key_that_is_refused_is_told_before_any_weight_is_loaded(server: WandbServer, base, photographs, tmp_path):
    log, wrong = [], "9" * 40
    with pytest.raises(ValueError, match=r"the run cannot be started on W&B at http://127.*: check wandb_api_key") as error:
        train(base, photographs, PLAIN, tmp_path / "w.zip", log.append, WandbTarget.of(wrong, None, None, None))
    assert wrong not in str(error.value)
    assert log[:1] == ["Seed: 1"]
    assert server.runs == []


def test_a_server_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with (
        pytest.raises(ValueError, match=r"W&B at http://127.0.0.1:9 \(.*connection refused.*\): check wandb_api_key"),
        WandbTracker(WandbTarget.of(KEY, None, None, None), print, init_seconds=1.0) as tracker,
    ):
        tracker.start(CONFIG, FACTS)


def test_a_server_that_goes_away_costs_the_run_and_not_the_training(server: WandbServer):
    log: list[str] = []
    with WandbTracker(WandbTarget.of(KEY, None, None, None), log.append, finish_seconds=1.0) as tracker:
        tracker.start(CONFIG, FACTS)
        server.gone = True
        tracker.step(1, {"loss": 0.5})
        tracker.end(1, {"loss": 0.5})
    assert log[-1] == "Warning: W&B did not take everything within 1 seconds: the run there is incomplete"


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


@pytest.mark.parametrize(
    ("mode", "inputs", "sentence"),
    [
        ("online", (None, "p", None, None), "wandb_project needs a wandb_api_key, unless WANDB_MODE=offline"),
        ("online", (KEY, "a/b", None, None), "wandb_project is 'a/b': give at most 128 characters, none of"),
        ("online", (KEY, None, "\n", None), r"wandb_run is '\\n': give at most 128 characters"),
        ("online", (KEY, None, None, "e" * 129), "wandb_entity is 'eee.*: give at most 128 characters"),
        ("shared", (KEY, None, None, None), "WANDB_MODE is 'shared': set online or offline, or leave it unset"),
    ],
)
def test_bad_names_and_modes_get_their_sentence(mode, inputs, sentence, monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, mode)
    with pytest.raises(ValueError, match=sentence):
        WandbTarget.of(*inputs)


def test_without_a_key_and_names_there_is_no_run_and_a_key_is_never_shown():
    assert WandbTarget.of(None, None, None, None) is None
    assert WandbTarget.of("", "", "", "") is None
    assert KEY not in repr(WandbTarget.of(KEY, None, None, None))

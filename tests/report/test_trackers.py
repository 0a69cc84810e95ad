"""Weights & Biases: through the real client, offline and to a server of our own; what is shown, and that nothing else is."""

import csv
import io
import json
import struct
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

import train as cog_train
from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.job import WandbTarget
from placeholder.model.base import MODEL_VARIABLE
from placeholder.report import samples as samples_module
from placeholder.report import wandb_run, wandb_target
from placeholder.report.wandb_run import WandbRun
from placeholder.service import launch
from placeholder.service.cli import inputs_of
from placeholder.service.launch import finetune_on_all_gpus
from placeholder.service.options import parser
from placeholder.training import setup as prepare_module
from placeholder.weights.metadata import TIME_VARIABLE
from tests.conftest import SHORT
from tests.support.samples import encoded, picture, read_zip, write_dataset
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


def children() -> list[psutil.Process]:
    """Every process that this one has started, however far down, and that still runs."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def around(tokenizer, base, monkeypatch):
    """Trainings on the tiny base model in this process; neither a process nor a temporary file is left by any test."""
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _base: tokenizer)
    monkeypatch.setattr(samples_module, "STEPS", 2)
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, "1")
    for name in (wandb_target.KEY_VARIABLE, wandb_target.MODE_VARIABLE, wandb_target.FOLDER_VARIABLE, wandb_run.URL_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    before = children()
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", folder)
            patch.setenv("TMPDIR", folder)
            yield
        assert children() == before
        assert list(Path(folder).iterdir()) == []


@pytest.fixture
def server(monkeypatch):
    """A W&B server on this machine that knows KEY."""
    with wandb_server(KEY) as found:
        monkeypatch.setenv(wandb_run.URL_VARIABLE, found.url)
        yield found


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The folder of runs that stay on this machine."""
    monkeypatch.setenv(wandb_target.MODE_VARIABLE, "offline")
    monkeypatch.setenv(wandb_target.FOLDER_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A data set of two pictures."""
    return write_dataset(tmp_path_factory.mktemp("data") / "data.zip", ["a photo of <zwx>", "<a/b> in a garden"])


def records(folder: Path) -> list[WandbRecord]:
    """What an offline run holds: LevelDB's log format, after a header of 7 bytes, with a protocol buffer in each record."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, found, record = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if kind == 0:  # the rest of a block of 32 KiB
            place = (place // 32768 + 1) * 32768
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(WandbRecord.FromString(record))
            record = b""
        if 32768 - place % 32768 < 7:
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


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """The lines of the history by their step."""
    lines = [items(record.history.item) for record in records(folder) if record.HasField("history")]
    return {line["_step"]: line for line in lines}


def test_an_offline_run_holds_the_training_and_neither_the_photographs_nor_the_key(offline, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv(TIME_VARIABLE, "1700000000")
    log: list[str] = []
    target = WandbTarget.of(KEY, None, "a name", "a-team")
    finetune_on_all_gpus(photographs, CONFIG, tmp_path / "shown.zip", log.append, target=target)
    finetune_on_all_gpus(photographs, CONFIG, tmp_path / "plain.zip", lambda _: None)
    assert (tmp_path / "shown.zip").read_bytes() == (tmp_path / "plain.zip").read_bytes()
    (folder,) = offline.glob("wandb/*")
    assert f"W&B: offline run in {folder}, which wandb sync uploads" in log

    entries, found = read_zip(tmp_path / "shown.zip"), records(offline)
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name, run.entity, run.host) == ("qwen-image-lora", "a name", "a-team", "")
    options = items(run.config.update)
    assert {name: options[name] for name in asdict(CONFIG)} == json.loads(json.dumps(asdict(CONFIG)))
    assert options["base_model"] == "tiny-base"

    meta, lines = json.loads(entries["meta.json"]), history(offline)
    curve = list(csv.DictReader(io.StringIO(entries["report/curve.csv"].decode())))
    assert list(lines) == [1, 2, 3, 4]
    assert [f"{line['loss']:.6g}" for line in lines.values()] == [row["loss"] for row in curve]
    assert f"{lines[4]['preservation']:.6g}" == curve[3]["preservation"]
    norms = [lines[4][f"row_norm/{name}/{number}"] for name in ("zwx", "a%2Fb") for number in (1, 2)]
    assert norms == [norm for token in CONFIG.tokens for norm in meta["placeholder_row_norms"][token]]
    assert [line["learning_rate/lora"] for line in lines.values()] == [0.0, 1e-2, 1e-2, 1e-2]  # the rows first learn alone
    assert lines[4]["learning_rate/token"] == pytest.approx(4e-4)

    media = {path.relative_to(folder / "files").as_posix(): path.read_bytes() for path in folder.rglob("files/**/*.jpg")}
    shown = {step: [media[name] for name in lines[step]["samples"]["filenames"]] for step in (2, 4)}
    assert shown == {step: [entries[f"report/samples/step-{step:06}-{number}.jpg"] for number in (1, 2)] for step in (2, 4)}
    assert lines[2]["samples"]["captions"] == ["a photo of <zwx>", "<a/b> in a garden"]
    assert [media[name] for name in lines[4]["before_and_after"]["filenames"]] == [entries["report/grid.jpg"]]
    summary = {}
    for record in found:
        summary |= items(record.summary.update) if record.HasField("summary") else {}
    assert summary["diagnostics"] == meta["diagnostics"]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]

    files = [path for path in offline.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".jpg", ".log", ".wandb"}
    assert set(media.values()) == {content for name, content in entries.items() if "samples" in name or "grid" in name}
    content = b"".join(path.read_bytes() for path in files)
    assert KEY.encode() not in content
    (run_file,) = (path for path in files if path.suffix == ".wandb")
    assert not any(place.encode() in run_file.read_bytes() for place in (str(ROOT), str(tmp_path), sys.executable))
    assert str(photographs).encode() not in content
    assert not any(entry in content for name, entry in read_zip(photographs).items() if name.endswith("png"))


def test_a_run_reaches_the_server_with_its_pictures(server: WandbServer):
    log: list[str] = []
    pictures = {"samples": [("a cat", encoded(picture(), "JPEG")), ("a dog", encoded(picture(seed=1), "JPEG"))]}
    with wandb_run.wandb_run(WandbTarget.of(KEY, "subjects", None, "me"), log.append) as run:
        run.start({"rank": 4})
        run.step(1, {"loss": 0.5})
        run.step(2, {"loss": 0.25}, pictures)
        run.summary({"images": 3})
    (name,) = {found["name"] for found in server.runs}
    assert log == [f"W&B: {server.url}/{ENTITY}/subjects/runs/{name}"]
    first = server.runs[0]
    assert (first["project"], first["entity"], first["displayName"], first["host"] or "") == ("subjects", "me", None, "")
    assert json.loads(first["config"])["rank"] == {"value": 4}
    lines = server.lines["wandb-history.jsonl"]
    assert [(line["_step"], line.get("loss")) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert lines[1]["samples"]["captions"] == ["a cat", "a dog"]
    assert [server.files[path] for path in lines[1]["samples"]["filenames"]] == [jpeg for _, jpeg in pictures["samples"]]
    assert server.lines["wandb-summary.json"][-1]["images"] == 3
    assert {Path(path).suffix for path in server.files} <= {".jpg", ".json", ".yaml"}
    assert not any(KEY.encode() in content or str(ROOT).encode() in content for content in server.files.values())
    assert server.exit_codes == [0]


def test_a_start_that_is_cancelled_waits_for_nothing(monkeypatch, server: WandbServer):
    server.gone = True
    start = time.monotonic()

    def cancelled(*_, **__):
        if time.monotonic() - start > 2.5:  # within the client's attempts to reach the server
            raise KeyboardInterrupt

    run = WandbRun(WandbTarget.of(KEY, None, None, None), print)
    monkeypatch.setattr(run, "_take", cancelled)
    with pytest.raises(KeyboardInterrupt), run:
        run.start({})
    assert time.monotonic() - start < 2.5 + wandb_run.GRACE_SECONDS


def test_a_cancelled_training_ends_its_run_as_failed(offline, photographs, tmp_path):
    def cancelled(line: str) -> None:
        if " 2/4 [" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_on_all_gpus(photographs, CONFIG, tmp_path / "w.zip", cancelled, target=WandbTarget.of(None, "p", None, None))
    assert [record.exit.exit_code for record in records(offline) if record.HasField("exit")] == [1]
    assert list(history(offline)) == [1]


def test_a_key_that_is_refused_is_told_before_any_weight_is_loaded(server: WandbServer, photographs, tmp_path):
    log: list[str] = []
    wrong = "9" * 40
    with pytest.raises(ValueError, match=r"the run cannot be started on W&B at http://127.*: check wandb_api_key") as error:
        finetune_on_all_gpus(
            photographs, CONFIG, tmp_path / "w.zip", log.append, target=WandbTarget.of(wrong, None, None, None)
        )
    assert wrong not in str(error.value)
    assert log == ["Seed: 1"]
    assert server.runs == []


def test_a_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv(wandb_run.URL_VARIABLE, "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    with (
        pytest.raises(ValueError, match=r"W&B at http://127.0.0.1:9 \(.*connection refused.*\): check wandb_api_key"),
        wandb_run.wandb_run(WandbTarget.of(KEY, None, None, None), print) as run,
    ):
        run.start({})


def test_a_server_that_goes_away_costs_the_run_and_not_the_training(server: WandbServer, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1.0)
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        server.gone |= " 1/2 [" in line

    config = replace(CONFIG, steps=2, sample_every=0, report=False, sample_prompts="")
    finetune_on_all_gpus(photographs, config, tmp_path / "w.zip", log, target=WandbTarget.of(KEY, None, None, None))
    assert (tmp_path / "w.zip").exists()
    assert lines[-1].startswith("Warning: W&B had not taken everything after 1 seconds")


def test_a_client_that_dies_is_a_warning(offline):
    log: list[str] = []
    with wandb_run.wandb_run(WandbTarget.of(None, "p", None, None), log.append) as run:
        run.start({})
        run.process.kill()
        run.process.wait()
        while run.alive:
            run.step(1, {"loss": 1.0})
    assert log[1:] == ["Warning: W&B has ended early: the training goes on without it"]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((None, "p", None, None), "wandb_project needs a wandb_api_key, unless WANDB_MODE=offline"),
        ((None, None, "r", None), "wandb_run needs a wandb_api_key"),
        ((None, None, None, "e"), "wandb_entity needs a wandb_api_key"),
        ((KEY, "a/b", None, None), "wandb_project is 'a/b': give at most 128 characters, none of"),
        ((KEY, None, "\n", None), r"wandb_run is '\\n': give at most 128 characters"),
        ((KEY, None, None, "e" * 129), "wandb_entity is 'eee.*: give at most 128 characters"),
    ],
)
def test_bad_inputs_get_their_sentence(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        WandbTarget.of(*inputs)


def test_a_mode_of_another_kind_gets_its_sentence(monkeypatch):
    monkeypatch.setenv(wandb_target.MODE_VARIABLE, "shared")
    with pytest.raises(ValueError, match="WANDB_MODE is 'shared': set online or offline, or leave it unset"):
        WandbTarget.of(KEY, None, None, None)


def test_a_folder_that_cannot_be_written_gets_its_sentence(offline):
    offline.write_bytes(b"a file")
    with (
        pytest.raises(ValueError, match="WANDB_DIR .* cannot be written"),
        WandbRun(WandbTarget.of(KEY, None, None, None), print) as run,
    ):
        run.start({})


def test_without_a_key_and_names_there_is_no_run_and_a_key_is_never_shown(offline):
    assert WandbTarget.of(None, None, None, None) is None
    assert WandbTarget.of("", "", "", "") is None
    assert KEY not in repr(replace(WandbTarget.of(KEY, None, None, None), key=KEY))


def test_the_names_without_a_key_are_refused_by_cogs_training_and_on_the_command_line(monkeypatch):
    with pytest.raises(ValueError, match="wandb_project needs a wandb_api_key"):
        cog_train.train(**{name: found.default for name, found in launch_inputs().items()} | {"wandb_project": "p"})
    monkeypatch.setenv(wandb_target.KEY_VARIABLE, KEY)
    assert inputs_of("train", {})["wandb_api_key"] == KEY
    with suppress(SystemExit):
        parser().parse_args(["train", "d.zip", "--wandb-api-key", KEY])
        pytest.fail("others on the machine would see the key")


def launch_inputs() -> dict[str, Any]:
    """The declared inputs of train.py."""
    from placeholder.service.options import declared

    return declared("train")

"""Training in child processes: the result of one process, lines in the log, errors in a sentence, nothing left behind."""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from demo.server import ROOT
from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.job import CheckpointFolder, Job, WandbTarget
from placeholder.model.base import MODEL_VARIABLE
from placeholder.service import launch
from placeholder.service.worker import ERROR_VARIABLE
from placeholder.training.checkpoint import stored_checkpoints
from placeholder.weights.archive import read_weights
from tests import conftest
from tests.support.parallel_steps import CONFIG, trained
from tests.support.samples import write_dataset
from tests.support.serving import running
from tests.support.trainings import children
from tests.support.wandb_server import WandbServer

SHORT = TrainConfig(**conftest.SHORT, train_placeholder_token=True, placeholder_token=("<zwx>",))


@pytest.fixture
def on_the_base(base, monkeypatch):
    """Trainings run on the small base model."""
    monkeypatch.setenv(MODEL_VARIABLE, base.source)


@pytest.fixture
def two_processes(on_the_base, monkeypatch):
    """Trainings run in two processes."""
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, "2")


def all_ended(before: list[psutil.Process]) -> bool:
    """Whether all children but those of `before` end within a few seconds."""
    _, alive = psutil.wait_procs([child for child in children() if child not in before], timeout=10)
    return not alive


def test_what_was_compiled_stays_when_the_folder_of_a_training_goes(dataset, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(launch, "run", lambda _, environment, *__: found.append(environment))
    launch.train(Job(dataset, SHORT, tmp_path / "weights.zip"), print)
    assert not Path(found[0]["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(found[0]["TMPDIR"])
    assert found[0]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    launch.train(Job(dataset, SHORT, tmp_path / "weights.zip"), print)
    assert found[1]["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.fixture(scope="module")
def parallel(base, dataset, tmp_path_factory) -> Path:
    """What two processes of tests/parallel_steps.py have left."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={os.devnull}"]
    arguments = ["-m", "tests.support.parallel_steps", str(dataset), base.source, str(folder)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, timeout=300)
    return folder


def test_two_processes_train_what_one_trains_with_twice_the_batch(parallel, base, dataset):
    first, second = (load_file(parallel / f"{index}.safetensors") for index in (0, 1))
    alone = trained(dataset, replace(CONFIG, batch_size=2), base, Processes())
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=0)
    once = trained(dataset, CONFIG, base, Processes())
    assert (once["rows"] - alone["rows"]).abs().max() > 1e-4  # so that equal is not what anything would be


def test_a_step_that_one_process_runs_out_of_memory_in_is_made_again_by_both_or_by_none(parallel):
    plain = load_file(parallel / "0.safetensors")
    for index in (0, 1):
        again = load_file(parallel / f"again-{index}.safetensors")
        assert again["checkpointed"].tolist() == [0, 0, 0] + [1] * 17
        assert all(torch.equal(value, plain[name]) for name, value in again.items() if name != "checkpointed")
    told = [json.loads((parallel / f"{index}.json").read_text()) for index in (0, 1)]
    assert told[0]["every time"] == "OutOfMemoryError: out of memory in another process, with every block checkpointed"
    assert told[1]["every time"] == "OutOfMemoryError: CUDA out of memory"
    for each in told:  # what the processes were given has to be the same
        assert each["same"] == "nothing"
        sentence = "ValueError: process 1 of this training and process 0 differ in the data set: give every"
        assert each["other"].startswith(sentence)
        assert each["ranks"] == [0, 1]


def test_the_archive_is_written_once_with_one_drawn_seed_and_the_lines_reach_the_log(two_processes, dataset, tmp_path):
    log: list[str] = []
    before = children()
    assert launch.train(Job(dataset, replace(SHORT, seed=None), tmp_path / "weights.zip"), log.append)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.zip"]
    weights = read_weights(tmp_path / "weights.zip")
    assert weights.meta["processes"] == 2 and weights.embeddings["<zwx>"].any()
    assert [line for line in log if line.startswith("Seed: ")] == [f"Seed: {weights.meta['seed']} (drawn)"]
    assert sum("100%|##########| 15/15 [" in line for line in log) == 1
    assert sum(line.startswith("Weights archive verified") for line in log) == 1
    assert not any(line == str(tmp_path / "weights.zip") for line in log)
    assert all_ended(before)


def test_what_the_user_did_wrong_is_a_value_error_of_one_sentence(on_the_base, tmp_path):
    empty = write_dataset(tmp_path / "empty.zip", [])
    before, log = children(), []
    with pytest.raises(ValueError, match="the data set holds no usable image"):
        launch.train(Job(empty, SHORT, tmp_path / "weights.zip"), log.append)
    assert not any("Traceback" in line for line in log)
    assert not (tmp_path / "weights.zip").exists()
    assert all_ended(before)


def test_an_error_that_nobody_foresaw_is_told_with_its_traceback_in_the_log(dataset, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").touch()  # and no model
    monkeypatch.setenv(MODEL_VARIABLE, str(tmp_path / "base"))
    log: list[str] = []
    with pytest.raises(RuntimeError, match="Error: "):
        launch.train(Job(dataset, SHORT, tmp_path / "weights.zip"), log.append)
    assert any("Traceback" in line and "placeholder/finetune.py" in line for line in log)


def test_a_cancelled_training_ends_its_processes_and_the_one_run_on_wandb(two_processes, dataset, tmp_path, monkeypatch):
    before, log, key = children(), [], "0123456789" * 4

    def cancelled(line: str) -> None:
        log.append(line)
        if " 10/1000 [" in line:
            started = [child.cmdline() for child in children() if child not in before]
            assert len(started) >= 3  # the launcher and two trainings
            assert not any(key in argument for command in started for argument in command)
            raise KeyboardInterrupt

    with running(WandbServer(key)) as server, tempfile.TemporaryDirectory(prefix="w") as folder:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        target = WandbTarget.of(key, "subjects", "-named", None)
        with pytest.raises(KeyboardInterrupt):
            checkpoints = CheckpointFolder(tmp_path / "checkpoints", 1000)
            config = replace(SHORT, steps=1000)
            launch.train(Job(dataset, config, tmp_path / "weights.zip", None, checkpoints, target), cancelled)
        assert all_ended(before)
        assert not list(Path(folder).glob("placeholder-*"))
    assert not (tmp_path / "weights.zip").exists()
    (last,) = stored_checkpoints(tmp_path / "checkpoints")  # for whose step all processes were needed
    assert f"Checkpoint: step {int(last.stem[-6:])}" in log
    assert {run["name"] for run in server.runs} == {server.runs[0]["name"]} and server.runs[0]["displayName"] == "-named"
    assert server.lines["wandb-history.jsonl"][0]["_step"] == 1
    assert server.exit_codes == [1]
    assert not any(key in line for line in log)


def test_a_process_of_several_that_is_killed_is_one_sentence(two_processes, dataset, tmp_path):
    before = children()

    def kill(line: str) -> None:
        if " 10/1000 [" in line:
            workers = [child for child in children() if "--overwrite" in child.cmdline() and not child.children()]
            workers[-1].kill()

    with pytest.raises(RuntimeError, match="^the training process was killed, most likely out of memory: give a smaller"):
        launch.train(Job(dataset, replace(SHORT, steps=1000), tmp_path / "weights.zip"), kill)
    assert all_ended(before)


def run(script: str, folder: Path, log=lambda _: None, grace: float = 1.0) -> None:
    """Follow a script of Python in the place of a training."""
    error = folder / "error.json"
    launch.run([sys.executable, "-c", script], os.environ | {ERROR_VARIABLE: str(error)}, error, grace, log)


def test_every_line_is_handed_on_also_a_last_one_without_its_end(tmp_path):
    log: list[str] = []
    run(r"import sys; sys.stdout.buffer.write(b'one\n\xff\r 50%\r100%\nlast')", tmp_path, log.append)
    assert log == ["one", "\N{REPLACEMENT CHARACTER}", " 50%", "100%", "last"]


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("os.kill(os.getpid(), 9)", "the training process was killed, most likely out of memory: give a smaller resolution"),
        ("os.kill(os.getpid(), 11)", r"the training process crashed in native code \(SIGSEGV\): see the log above"),
        ("os.abort()", r"the training process crashed in native code \(SIGABRT\): see the log above"),
        ("os._exit(3)", "the training process ended with exit code 3: see the log above"),
    ],
)
def test_a_process_that_dies_without_a_word_is_one_sentence(end, sentence, tmp_path):
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        run(f"import os; {end}", tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [("ValueError('wrong')", ValueError, "wrong"), ("RuntimeError('nan')", RuntimeError, "nan")]
    + [("KeyError('x')", RuntimeError, "KeyError: 'x'")],
)
def test_an_error_stays_what_it_is_and_the_process_that_waits_is_ended(error, kind, message, tmp_path):
    log: list[str] = []
    script = (
        f"from placeholder.service import worker\ntry:\n    raise {error}\nexcept Exception as error:\n    worker._fail(error)"
    )
    with pytest.raises(kind) as found:
        run(script, tmp_path, log.append)
    assert (type(found.value), str(found.value)) == (kind, message)
    assert any("Traceback" in line for line in log) == (kind is RuntimeError)


def test_a_process_that_heeds_nothing_is_killed_and_so_is_what_it_started(tmp_path):
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "  # as its children do then
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('started', flush=True); time.sleep(60)"
    )
    before, start = children(), time.monotonic()

    def cancelled(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path, cancelled)
    assert all_ended(before)
    assert time.monotonic() - start < 30


WATCHED = """
import sys, time
from placeholder.job import Stop
from placeholder.service.worker import end_when_asked
stop = Stop(heeded=sys.argv[1] == "heeds")
end_when_asked(stop)
print("ready", flush=True)
while not stop.wanted:
    time.sleep(0.01)
print("a last checkpoint", flush=True)
"""


@pytest.mark.parametrize(("heeds", "told"), [("heeds", "a last checkpoint\n"), ("does not", "")])
@pytest.mark.parametrize("asked", ["its standard input closes", "SIGTERM"])
def test_a_process_ends_when_it_is_asked_to_or_its_starter_has_gone(asked, heeds, told, tmp_path):
    environment = os.environ | {ERROR_VARIABLE: str(tmp_path / "error.json")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WATCHED, heeds], cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        if asked == "SIGTERM":
            process.terminate()
        else:
            process.stdin.close()
        assert process.stdout.read() == told
        assert process.wait(30) == (0 if told else 1)


def test_a_process_of_a_launcher_that_is_killed_ends():
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WATCHED!r}, 'does not'])"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert select.select([launcher.stdout], [], [], 30)[0], "it goes on without its launcher"
        assert launcher.stdout.read() == ""


def test_the_server_and_the_command_line_start_trainings_without_torch():
    modules = "placeholder, train, placeholder.service.launch, placeholder.service.files"
    code = f"import sys, {modules}; print([name for name in ('torch', 'diffusers', 'accelerate') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


@pytest.mark.parametrize(("value", "gpus", "count"), [("1", 4, 1), ("4", 4, 4), ("8", 0, 8), ("", 4, 4), ("", 0, 1)])
def test_the_number_of_processes_is_the_variables_or_that_of_the_gpus(value, gpus, count, monkeypatch):
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, value)
    monkeypatch.setattr(launch, "visible_gpus", lambda: gpus)
    assert launch.process_count() == count


def test_the_gpus_are_those_that_cuda_sees():
    assert launch.visible_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("value", "gpus", "most"),
    [*((value, 0, "") for value in ("0", "-1", "two", "1.5")), ("5", 4, " to 4, the number of GPUs"), ("0", 1, " to 1")],
)
def test_any_other_number_of_processes_gets_its_sentence(value, gpus, most, monkeypatch):
    monkeypatch.setenv(launch.PROCESSES_VARIABLE, value)
    monkeypatch.setattr(launch, "visible_gpus", lambda: gpus)
    with pytest.raises(ValueError, match=f"TRAINING_PROCESSES is '{re.escape(value)}': give a whole number from 1{most}"):
        launch.process_count()

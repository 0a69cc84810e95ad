"""The command line: the same options, results and errors as Cog's functions, and lines for a terminal and for a file."""

import io
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr

import predict as predict_module
from demo.server import ROOT
from placeholder import generate as generate_module
from placeholder.config import OPTIONS, TrainConfig, train_config
from placeholder.errors import Log
from placeholder.job import CheckpointFolder, Job, WandbTarget
from placeholder.model.base import MODEL_VARIABLE
from placeholder.service import cli as command_line
from placeholder.service.cli import inputs_of, main, with_hyphens
from placeholder.service.console import CLEAR_LINE, Console
from placeholder.service.parser import INPUTS, POSITIONAL, parser
from placeholder.weights.archive import LORA_NAME
from tests.support.samples import Run, read_zip

COMMAND = [sys.executable, "-m", "placeholder"]
SHORT = ["--no-report", "--steps", "15", "--rank", "4", "--resolution", "64", "--learning_rate", "1e-2", "--seed", "1"]
SHORT += ["--placeholder-token", "<zwx>", "--prior-preservation", "4", "--log-prompt-ids"]
DRAWN = ["--steps", "3", "--width", "64", "--height", "64", "--seed", "7", "--negative-prompt", "blurry"]
METER = "{:3}%|{:10}| {}/15 [00:00<00:00, loss=1.0]"


def actions(command: str) -> dict:
    """What argparse has been told of each option, by input name."""
    (commands,) = (action for action in parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict))
    return {action.dest: action for action in commands.choices[command]._actions if action.dest != "help"}


@pytest.fixture
def sigterm():
    """The handler that `main` sets is taken back; Ctrl-C is heard, also where these tests run in the background of a shell."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(arguments: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    """The command as a process of its own, in a folder that is not the package's."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def exit_code(arguments: list[str], commands: dict = command_line.COMMANDS) -> int:
    """The exit code of a command in this process."""
    try:
        return main(arguments, commands)
    except SystemExit as ended:
        return ended.code


def refused(arguments: list[str], capsys) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    code = exit_code(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.mark.parametrize("command", INPUTS)
def test_every_input_is_an_option_and_secrets_are_none(command):
    found = actions(command)
    options = {name: option for name, option in INPUTS[command].items() if option.kind is not SecretStr}
    assert set(found) == set(options) | {"output", "overwrite"}
    for name, option in options.items():
        strings = [] if name == POSITIONAL[command] else ["--" + name.replace("_", "-")]
        if option.kind is bool:
            strings.append(strings[0].replace("--", "--no-"))
        assert found[name].option_strings == strings
        assert option.description.replace("%", "%%") in found[name].help


def test_a_secret_comes_from_the_environment_and_is_no_option(monkeypatch):
    assert inputs_of("train", {})["hf_token"] is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert inputs_of("train", {})["hf_token"] == "hf_secret"
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "d.zip", "--hf-token", "hf_secret"])


def test_what_is_not_given_has_the_declared_default_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = inputs_of("train", {"dataset": "d.zip", "config": "", "steps": 3})
    expected = {name: option.default for name, option in INPUTS["train"].items()}
    assert inputs == expected | {"dataset": tmp_path / "d.zip", "steps": 3}
    assert inputs_of("predict", {"replicate_weights": "https://a/b.zip"})["replicate_weights"] == "https://a/b.zip"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--learning_rate", "a_b"], ["--learning-rate", "a_b"]),
        (["--default_caption=a_b --c_d"], ["--default-caption=a_b --c_d"]),
        (["x_y", "--", "--a_b"], ["x_y", "--", "--a_b"]),
    ],
)
def test_names_may_be_written_with_underscores(given, expected):
    assert with_hyphens(given) == expected


def test_a_training_is_the_job_that_the_options_ask_for(sigterm, tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    arguments = ["train", str(tmp_path / "d.zip"), "-o", str(tmp_path / "w.zip"), "--quantize", "--placeholder-token", "<zwx>"]
    folder = str(tmp_path / "c")
    more = ["--steps=40", "--checkpoint_folder", folder, "--checkpoint_every=5", "--resume_from", folder]
    names = ["--wandb-project", "p", "--wandb-run", "r", "--wandb-entity", "e"]
    commands = {"train": partial(command_line.train, launch=lambda job, log: jobs.append(job) or True)}
    assert main([*arguments, *more, *names], commands) == 0
    config = TrainConfig(steps=40, quantize=True, train_placeholder_token=True, placeholder_token=("<zwx>",))
    checkpoints, tracker = CheckpointFolder(tmp_path / "c", 5), WandbTarget("a key", "p", "r", "e")
    assert jobs == [Job(tmp_path / "d.zip", config, tmp_path / "w.zip", tmp_path / "c", checkpoints, tracker)]
    assert capsys.readouterr().out == f"{tmp_path / 'w.zip'}\n"


def test_every_file_of_a_training_may_be_a_url_and_is_fetched_after_the_options_are_checked(sigterm, tmp_path, site, capsys):
    address, folder = site
    contents = {"my data.zip": b"images", "start.zip": b"weights", "c.yaml": b"train: {steps: 7}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    seen = []

    def launch(job: Job, log) -> bool:
        seen.append((job.dataset.read_bytes(), job.resume_from.read_bytes(), job.config.steps, job.dataset))
        return True

    files = ["--resume-from", f"{address}/start.zip", "--config", f"{address}/c.yaml"]
    arguments = ["train", f"{address}/my%20data.zip", "-o", str(tmp_path / "w.zip"), *files]
    assert main(arguments, {"train": partial(command_line.train, launch=launch)}) == 0
    assert seen[0][:3] == (b"images", b"weights", 7)
    assert not seen[0][3].exists()
    (folder / "my data.zip").unlink()
    capsys.readouterr()
    assert refused([*arguments, "--rank", "0"], capsys) == (2, "error: rank is 0: give a whole number from 1 to 256")
    code, line = refused(arguments, capsys)
    assert code == 2
    assert line.endswith(f"could not be fetched from {address}/my%20data.zip (HTTP status 404): check the URL")


def test_a_key_of_wandb_alone_makes_no_run(sigterm, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    command_line.train(
        {"dataset": "d.zip", "output": str(tmp_path / "w.zip")}, print, lambda job, log: jobs.append(job) or True
    )
    assert jobs[0].tracker is None


def test_a_process_of_another_rank_checks_no_output_and_no_hub_and_prints_no_path(sigterm, tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "w.zip").write_text("old")
    names = ["--hf-repo-id", "not a name", "--wandb-project", "p"]
    commands = {"train": partial(command_line.train, launch=lambda job, log: bool(jobs.append(job)))}
    assert main(["train", "d.zip", "-o", str(tmp_path / "w.zip"), *names], commands) == 0
    assert capsys.readouterr().out == ""
    assert (jobs[0].output, jobs[0].tracker) == (tmp_path / "w.zip", None)
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "d.zip", "-o", str(tmp_path / "w.zip"), *names], commands) == 2
    assert len(jobs) == 1


def test_help_says_what_there_is_and_imports_neither_torch_nor_cog():
    code = """
import sys
from placeholder.service.cli import main
try:
    main(["train", "--help"])
finally:
    assert not {"torch", "cog", "diffusers", "transformers"} & set(sys.modules)
"""
    env = os.environ | {"COLUMNS": "200"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [line.strip() for line in found.stdout.splitlines()]
    assert "--steps N                     Training steps. [1 to 20000, default 1000]" in lines
    (quantize,) = (line for line in lines if line.startswith("--quantize, --no-quantize     Quantize the transformer"))
    assert quantize.endswith("less memory, slower. [default off]")
    assert {f"{option.heading}:" for option in INPUTS["train"].values()} <= set(lines)
    assert "HF_TOKEN: Token of the Hugging Face Hub" in found.stdout
    assert "WANDB_API_KEY: API key" in found.stdout
    assert "QWEN_IMAGE_MODEL" in found.stdout


ERRORS = {
    "no command": ([], "error: the following arguments are required: command"),
    "no data set": (["train"], "error: the following arguments are required: dataset"),
    "an empty data set": (["train", ""], "error: dataset is missing: give a zip or tar"),
    "unknown": (["train", "d.zip", "--stepz", "3"], "error: unrecognized arguments: --stepz 3"),
    "cut short": (["train", "d.zip", "--ste", "3"], "error: unrecognized arguments: --ste 3"),
    "no number": (["train", "d.zip", "--steps", "x"], "error: argument --steps: invalid int value: 'x'"),
    "range": (["train", "d.zip", "--steps", "0"], "error: steps is 0: give a whole number from 1 to 20000"),
    "choice": (["predict", "a", "--output-format", "gif"], "error: output_format is 'gif': choose one of webp, jpg, png"),
    "format": (["predict", "a", "-o", "a.png", "--output-format", "jpg"], "error: output a.png is a png by its name and"),
    "suffix": (["predict", "a", "-o", "a.gif"], "error: output a.gif has no suffix of an image"),
    "prompt": (["predict", " ", "-o", "a.png"], "error: prompt is empty"),
    "folder": (["train", "d.zip", "-o", "no/w.zip"], "error: output no/w.zip: the folder"),
    "is a folder": (["train", "d.zip", "-o", "."], "error: output . is a folder"),
    "itself": (
        ["train", "old.zip", "-o", "./././old.zip", "--overwrite"],
        "error: output ./././old.zip would replace the file of dataset: give another name",
    ),
    "exists": (["train", "d.zip", "-o", "old.zip"], "error: output old.zip exists: give another name, or --overwrite"),
    "weights": (["predict", "a", "--replicate-weights", "no.zip"], "error: the weights no.zip are not a file"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said_in_one_line_and_the_exit_code_is_2(case, sigterm, tmp_path, monkeypatch, capsys):
    arguments, sentence = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    Path("old.zip").write_text("old")
    code, line = refused(arguments, capsys)
    assert code == 2
    assert line.startswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["old.zip"]
    assert Path("old.zip").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("the loss\nbecame nan"), 1, "error: the loss became nan"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError(), 1, "error: RuntimeError"),
    ],
)
def test_how_a_failure_ends(error, code, line, sigterm, capsys):
    def fails(given, console):
        raise error

    assert main(["train", "d.zip"], {"train": fails}) == code
    assert capsys.readouterr().err == f"{line}\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_stays_on_one_line_and_other_lines_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    console = Console(stream)
    first, last = METER.format(7, "#", 1), METER.format(100, "#" * 10, 15)
    for line in ("Seed: 1", first, "Checkpoint: step 1", last, "done"):
        console(line)
    console.end("the end")
    assert stream.getvalue() == (
        f"{CLEAR_LINE}Seed: 1\n{CLEAR_LINE}{first[:39]}{CLEAR_LINE}Checkpoint: step 1\n{first[:39]}"
        f"{CLEAR_LINE}{last[:39]}\n{CLEAR_LINE}done\nthe end\n"
    )
    console(first)
    console.end("error: x")
    assert stream.getvalue().endswith(f"{first[:39]}\nerror: x\n")


@pytest.mark.parametrize("dumb", [False, True])
def test_elsewhere_every_line_stands_by_itself(dumb, monkeypatch):
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    stream = Terminal() if dumb else io.StringIO()
    console = Console(stream)
    lines = ["Seed: 1", METER.format(7, "#", 1), METER.format(13, "#", 2)]
    for line in lines:
        console(line)
    assert stream.getvalue() == "\n".join(lines) + "\n"


def test_a_training_writes_the_archive_of_the_same_configuration(base, dataset, zero_prior: Run, tmp_path):
    inputs = inputs_of("train", vars(parser().parse_args(with_hyphens(["train", "d.zip", *SHORT]))))
    assert train_config({name: inputs[name] for name in inputs if name in OPTIONS}) == zero_prior.config
    found = run(
        ["train", str(dataset), "-o", "w.zip", *SHORT], tmp_path, **{MODEL_VARIABLE: os.path.relpath(base.source, tmp_path)}
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{tmp_path / 'w.zip'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["w.zip"]
    ours, expected = read_zip(tmp_path / "w.zip"), read_zip(zero_prior.archive)
    assert ours[LORA_NAME] == expected[LORA_NAME]
    assert ours["embeddings/zwx.safetensors"] == expected["embeddings/zwx.safetensors"]
    lines = found.stderr.splitlines()
    assert "\x1b" not in found.stderr
    assert "\r" not in found.stderr
    assert [line.split(" [")[0] for line in lines if "/15 [" in line] == [
        line.split(" [")[0] for line in zero_prior.log if "/15 [" in line
    ]


def test_a_prediction_on_a_terminal_draws_the_picture_of_cogs_function(base, zero_prior, tokenizer, tmp_path, monkeypatch):
    arguments = ["predict", "a photo of <zwx>", "--replicate-weights", str(zero_prior.archive), "-o", "picture.png", *DRAWN]
    terminal, other = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), MODEL_VARIABLE: base.source, "TERM": "xterm"}
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=other)
    os.close(other)
    shown = b"".join(iter(lambda: read_terminal(terminal), b"")).decode()
    assert process.wait() == 0, shown
    with process.stdout:
        assert process.stdout.read().decode() == f"{tmp_path / 'picture.png'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    rewritten = [line for line in shown.split("\r\n") if "3/3 [" in line]
    assert len(rewritten) == 1
    assert rewritten[0].count(CLEAR_LINE) == 3
    assert "Seed: 7, size: 64x64\r\n" in shown

    monkeypatch.setattr(generate_module, "load_tokenizer", lambda _base: tokenizer)
    predictor = predict_module.Predictor()
    predictor.generator, predictor.default_weights = generate_module.ImageGenerator(base, lambda line: None), None
    inputs = inputs_of("predict", vars(parser().parse_args(arguments)) | {"output_format": "png"})
    expected = Image.open(predictor.predict(**inputs))
    found = Image.open(tmp_path / "picture.png")
    assert (found.format, found.size) == ("PNG", (64, 64))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def read_terminal(terminal: int) -> bytes:
    """What comes next; empty when the other side is closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_unwinds_and_says_how_to_resume(number, code, sigterm, tmp_path, capsys):
    def interrupted(job: Job, log: Log) -> bool:
        try:
            log("  1%|#| 7/1000 [")
            signal.raise_signal(number)
        finally:
            job.checkpoints.path.mkdir()
            (job.checkpoints.path / "checkpoint-000007.safetensors").write_text("a last checkpoint")

    arguments = ["train", "d.zip", "-o", str(tmp_path / "w.zip"), "--checkpoint-folder", str(tmp_path / "my folder")]
    assert exit_code(arguments, {"train": partial(command_line.train, launch=interrupted)}) == code
    shown = capsys.readouterr().err.splitlines()
    assert shown[1] == f"--resume-from '{tmp_path / 'my folder'}' resumes from the last checkpoint"
    assert shown[2:] == (["interrupted"] if number == signal.SIGINT else [])

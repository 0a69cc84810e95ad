"""The command line: the same options, results and errors as Cog's functions, and lines for a terminal and for a file."""

import inspect
import io
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cog import Secret
from PIL import Image

import predict as predict_module
import train as train_module
from demo.server import ROOT
from placeholder import generate as generate_module
from placeholder.config import train_config
from placeholder.job import WandbTarget
from placeholder.model.base import MODEL_VARIABLE
from placeholder.service import cli as command_line
from placeholder.service import launch
from placeholder.service.cli import inputs_of, main, with_hyphens
from placeholder.service.console import CLEAR_LINE, Console
from placeholder.service.inputs import declared_inputs
from placeholder.service.options import GROUPS, POSITIONAL, SECRET, SOURCES, declared, parser
from placeholder.training.checkpoint import stored_checkpoints, write_checkpoint
from placeholder.weights.archive import LORA_NAME
from tests.support.samples import Run, read_zip

COMMAND = [sys.executable, "-m", "placeholder"]
FUNCTIONS = {"train": train_module.train, "predict": predict_module.Predictor.predict}
SHORT = [
    "--no-report",
    "--steps",
    "15",
    "--rank",
    "4",
    "--resolution",
    "64",
    "--learning_rate",
    "1e-2",
    "--seed",
    "1",
    "--placeholder-token",
    "<zwx>",
    "--log-prompt-ids",
]
DRAWN = ["--steps", "3", "--width", "64", "--height", "64", "--seed", "7", "--negative-prompt", "blurry"]
METER = "{:3}%|{:10}| {}/15 [00:00<00:00, loss=1.0]"


def fields(command: str) -> dict:
    """What Cog itself knows of the inputs, by name: annotation and field."""
    parameters = inspect.signature(FUNCTIONS[command]).parameters.values()
    return {each.name: (each.annotation, each.default) for each in parameters if each.name != "self"}


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


def exit_code(arguments: list[str]) -> int:
    """The exit code of a command in this process."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


def refused(arguments: list[str], capsys) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    code = exit_code(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_declarations_are_read_as_cog_reads_them(command):
    expected = fields(command)
    found = declared(command)
    assert list(found) == list(expected)
    for name, (annotation, field) in expected.items():
        kind = next((part for part in getattr(annotation, "__args__", ()) if part is not type(None)), annotation)
        assert found[name].kind == kind.__name__
        assert found[name].required == (field.default is None and annotation is kind)
        for fact in ("default", "description", "ge", "le"):
            assert getattr(found[name], fact) == getattr(field, fact), (name, fact)
        assert (found[name].choices or None) == (field.choices or None)
        assert found[name].deprecated == bool(field.deprecated)


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_options_are_the_declared_inputs_one_to_one(command):
    found = actions(command)
    own = {"output", "overwrite"}
    options = {name: option for name, option in declared(command).items() if option.kind != SECRET}
    assert set(found) == set(options) | own
    for name, option in options.items():
        strings = found[name].option_strings
        expected = [] if name == POSITIONAL[command] else ["--" + name.replace("_", "-")]
        if option.kind == "bool":
            expected.append(expected[0].replace("--", "--no-"))
        assert strings == expected
        assert found[name].choices == option.choices
        assert option.description.replace("%", "%%") in found[name].help


def test_a_secret_comes_from_the_environment_and_is_no_option(monkeypatch):
    assert inputs_of("train", {})["hf_token"] is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert inputs_of("train", {})["hf_token"] == "hf_secret"
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "d.zip", "--hf-token", "hf_secret"])


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_heading_names_inputs_that_there_are_and_each_once(command):
    named = [name for names in GROUPS[command].values() for name in names.split()]
    assert len(named) == len(set(named))
    assert set(named) < set(declared(command)) - {POSITIONAL[command]}


def test_an_input_that_is_added_becomes_an_option(tmp_path, monkeypatch):
    text = (
        (ROOT / "train.py")
        .read_text()
        .replace("    steps: int", "    new: Optional[float] = Input(default=None),\n    steps: int")
    )
    path = tmp_path / "train.py"
    path.write_text(text.replace("Input(default=None),", 'Input(default=None, ge=0, le=2, description="New, 5 %."),'))
    monkeypatch.setitem(SOURCES, "train", (str(path), "train"))
    assert declared_inputs(*SOURCES["train"])["new"].le == 2
    assert vars(parser().parse_args(["train", "d.zip", "--new", "1.5"]))["new"] == 1.5
    assert "New, 5 %. [0 to 2]" in parser()._subparsers._group_actions[0].choices["train"].format_help()


def test_what_is_not_given_has_the_declared_default_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = inputs_of("train", {"dataset": "d.zip", "config": "", "steps": 3})
    expected = {name: option.default for name, option in declared("train").items()}
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


def test_a_training_is_told_what_cogs_function_tells_it(sigterm, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(launch, "train", lambda job, log: told.append(job) or True)
    given = {"dataset": tmp_path / "d.zip", "steps": 40, "placeholder_token": "<zwx>", "quantize": True, "seed": 3}
    given |= {
        "resume_from": tmp_path / "c",
        "checkpoint_folder": str(tmp_path / "c"),
        "checkpoint_every": 5,
        "class_word": "cat",
        "wandb_project": "p",
        "wandb_run": "r",
        "wandb_entity": "e",
    }
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    defaults = {name: field.default for name, (_, field) in fields("train").items()}
    train_module.train(**defaults | given | {"wandb_api_key": Secret("a key")})
    arguments = [
        "--" + name.replace("_", "-") + f"={value}" for name, value in given.items() if name not in ("dataset", "quantize")
    ]
    assert main(["train", str(given["dataset"]), "-o", str(tmp_path / "w.zip"), "--quantize", *arguments]) == 0
    cogs, ours = told
    assert ours == replace(cogs, output=tmp_path / "w.zip")
    assert cogs.tracker == WandbTarget("a key", "p", "r", "e")
    assert capsys.readouterr().out == f"{tmp_path / 'w.zip'}\n"


def test_help_is_fast_and_says_what_there_is(tmp_path):
    code = (
        "import sys; from placeholder.service.options import parser; parser().format_help(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code + "; assert 'cog' not in sys.modules"], cwd=ROOT, check=True)
    start = time.monotonic()
    found = run(["train", "--help"], tmp_path, COLUMNS="200")
    assert time.monotonic() - start < 2  # 0.2 s on a quiet machine
    assert found.returncode == 0
    lines = [line.strip() for line in found.stdout.splitlines()]
    assert "--steps N                     Training steps. [1 to 20000, default 1000]" in lines
    (quantize,) = (line for line in lines if line.startswith("--quantize, --no-quantize     Store the transformer"))
    assert quantize.endswith("less memory, slower. [default off]")
    assert {f"{title}:" for title in GROUPS["train"]} <= set(lines)


ERRORS = {
    "no command": ([], "error: the following arguments are required: command"),
    "no data set": (["train"], "error: the following arguments are required: dataset"),
    "an empty data set": (["train", ""], "error: dataset is missing: give a zip or tar"),
    "unknown": (["train", "d.zip", "--stepz", "3"], "error: unrecognized arguments: --stepz 3"),
    "cut short": (["train", "d.zip", "--ste", "3"], "error: unrecognized arguments: --ste 3"),
    "no number": (["train", "d.zip", "--steps", "x"], "error: argument --steps: invalid int value: 'x'"),
    "range": (["train", "d.zip", "--steps", "0"], "error: steps is 0: give a whole number from 1 to 20000"),
    "choice": (["predict", "a", "--output-format", "gif"], "error: argument --output-format: invalid choice: 'gif'"),
    "format": (["predict", "a", "-o", "a.png", "--output-format", "jpg"], "error: output a.png is a png by its name and"),
    "suffix": (["predict", "a", "-o", "a.gif"], "error: output a.gif has no suffix of a picture"),
    "prompt": (["predict", " ", "-o", "a.png"], "error: prompt is empty"),
    "folder": (["train", "d.zip", "-o", "no/w.zip"], "error: output no/w.zip: the folder"),
    "is a folder": (["train", "d.zip", "-o", "."], "error: output . is a folder"),
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
def test_how_a_failure_ends(error, code, line, sigterm, monkeypatch, capsys):
    def fails(given, console):
        raise error

    monkeypatch.setattr(command_line, "train", fails)
    assert refused(["train", "d.zip"], capsys) == (code, line)


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
    assert train_config({name: inputs[name] for name in inputs if name not in train_module.FILES}) == zero_prior.config
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


def interrupting(part: str, number: int) -> type[Console]:
    """A console that sends this process a signal when a line with that part comes."""

    class Interrupting(Console):
        def __call__(self, line: str) -> None:
            super().__call__(line)
            if part in line:
                signal.raise_signal(number)

    return Interrupting


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_unwinds_and_says_how_to_go_on(number, code, sigterm, tmp_path, monkeypatch, capsys):
    def interrupted(job, log):
        """What the launch module does, whose own tests have real processes."""
        try:
            log("  1%|#| 7/1000 [")
        finally:
            job.checkpoints.path.mkdir()
            write_checkpoint(job.checkpoints, 7, {"rows": torch.zeros(1)}, {})

    monkeypatch.setattr(launch, "train", interrupted)
    monkeypatch.setattr(command_line, "Console", interrupting("7/1000 [", number))
    arguments = ["train", "d.zip", "-o", str(tmp_path / "w.zip"), "--checkpoint-folder", str(tmp_path / "my folder")]
    assert exit_code(arguments) == code
    (stored,) = stored_checkpoints(tmp_path / "my folder")
    shown = capsys.readouterr().err.splitlines()
    assert shown[1] == f"--resume-from '{stored}' goes on from the last checkpoint"
    assert shown[2:] == (["interrupted"] if number == signal.SIGINT else [])


def test_a_data_set_that_is_not_there_is_said_and_nothing_is_left(base, sigterm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODEL_VARIABLE, base.source)
    assert main(["train", "d.zip"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: d.zip is not a file: give a zip or tar archive"
    assert not list(tmp_path.iterdir())


def test_help_names_the_secrets_that_the_environment_holds(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "HF_TOKEN: Token of the Hugging Face hub" in shown and "WANDB_API_KEY: API key" in shown
    assert "QWEN_IMAGE_MODEL" in shown

"""The command line: training and prediction without Cog, with the same inputs.

The libraries that take seconds to import are imported by the command that needs them, so that --help is fast.
"""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import SecretStr

from placeholder.errors import Log
from placeholder.job import Job
from placeholder.request import image_request
from placeholder.service.console import Console
from placeholder.service.launch import train as train_on_all_gpus
from placeholder.service.parser import INPUTS, parser

SUFFIXES = {".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg", ".png": "png"}
RANK_VARIABLE = "RANK"  # set by accelerate launch and torchrun
WANDB_NAMES = ("wandb_project", "wandb_run", "wandb_entity")


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """The arguments with --like_this written --like-this, up to a bare `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    named = [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in (argument.partition("=") for argument in arguments[:end])
    ]
    return [*named, *arguments[end:]]


def inputs_of(command: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every input by name, with its default where it was not given; paths are absolute, and empty ones are None.

    A secret such as hf_token is read from the environment variable of its name, HF_TOKEN.
    """
    inputs = {}
    for name, option in INPUTS[command].items():
        value = os.environ.get(name.upper()) if option.kind is SecretStr else given.get(name, option.default)
        if option.kind is Path:
            value = _path(value) if value else None
        inputs[name] = value
    return inputs


def _path(value: str) -> Path | str:
    """Absolute, so that messages and records name it whole; a URL as it is."""
    return value if value.startswith(("http://", "https://")) else Path(value).absolute()


@contextmanager
def fetched(inputs: dict[str, Any], *names: str) -> Iterator[dict[str, Path]]:
    """A local file, while this lasts, for each of these inputs that is a URL."""
    urls = {name: inputs[name] for name in names if isinstance(inputs[name], str)}
    with ExitStack() as kept:
        if urls:
            from placeholder.model.download import local_file

            urls = {name: kept.enter_context(local_file(url)) for name, url in urls.items()}
        yield urls


def output_path(value: str, overwrite: bool) -> Path:
    """The path to write to. Raises ValueError where that cannot be, before any work is done."""
    path = Path(value).absolute()
    if not path.parent.is_dir():
        raise ValueError(f"output {value}: the folder {path.parent} does not exist, make it first")
    if path.is_dir():
        raise ValueError(f"output {value} is a folder: give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"output {value}: the folder {path.parent} cannot be written")
    if path.exists() and not overwrite:
        raise ValueError(f"output {value} exists: give another name, or --overwrite")
    return path


def output_format(given: dict[str, Any]) -> str | None:
    """The format that the suffix of the output asks for; None where neither it nor --output-format is given."""
    output, wanted = given.get("output"), given.get("output_format")
    if output is None:
        return wanted
    found = SUFFIXES.get(Path(output).suffix.lower(), wanted)
    if found is None:
        raise ValueError(f"output {output} has no suffix of an image: end it in .webp, .jpg or .png, or give --output-format")
    if wanted not in (None, found):
        raise ValueError(f"output {output} is a {found} by its name and --output-format is {wanted}: give one of them")
    return found


def train(given: dict[str, Any], console: Console, launch: Callable[[Job, Log], bool] = train_on_all_gpus) -> Path | None:
    """A whole training; returns the path of the archive, None in a process that does not write it.

    Of the processes that accelerate launch or torchrun starts, rank 0 alone checks the output and the hub. `launch` trains and
    returns whether this process wrote the archive.
    """
    first = os.environ.get(RANK_VARIABLE, "0") == "0"
    inputs = inputs_of("train", given)
    if not any(inputs[name] for name in WANDB_NAMES):
        inputs["wandb_api_key"] = None  # the environment may hold it for other programs
    if not first:
        inputs |= dict.fromkeys(("wandb_api_key", *WANDB_NAMES, "hf_repo_id", "hf_token"))
    path, overwrite = given.get("output", "weights.zip"), given.get("overwrite", False)
    output = output_path(path, overwrite) if first else Path(path).absolute()
    for name in ("dataset", "resume_from", "config"):
        if inputs[name] and os.path.realpath(inputs[name]) == os.path.realpath(output):
            raise ValueError(f"output {path} would replace the file of {name}: give another name")
    with fetched(inputs, "config") as files:
        job = Job.of(inputs | files, output)
    repository = None
    if inputs["hf_repo_id"]:
        from placeholder.report.hub import HubRepository

        repository = HubRepository.of(inputs["hf_repo_id"], inputs["hf_token"])
        repository.check()
    try:
        with fetched(inputs, "dataset", "resume_from") as files:
            written = launch(replace(job, **files), console)
    except (KeyboardInterrupt, SystemExit):
        folder = job.checkpoints.path if job.checkpoints else None
        if folder is not None and any(folder.glob("checkpoint-*.safetensors")):
            console.end(f"--resume-from {shlex.quote(str(folder))} resumes from the last checkpoint")
        raise
    if written and repository:
        repository.upload(job.output, console)
    return job.output if written else None


def predict(given: dict[str, Any], console: Console) -> Path:
    """A whole prediction; returns the path of the image."""
    found = output_format(given)
    inputs = inputs_of("predict", given | ({"output_format": found} if found else {}))
    names = ("replicate_weights", "extra_lora_weights")
    request = image_request({name: value for name, value in inputs.items() if name not in names})
    output = output_path(given.get("output", f"output.{request.output_format}"), given.get("overwrite", False))

    from placeholder.generate import ImageGenerator, save_image
    from placeholder.lora.distilled import load_fast_lora
    from placeholder.model.base import BaseModel
    from placeholder.weights.archive import read_weights

    with ExitStack() as kept:
        files = inputs | kept.enter_context(fetched(inputs, *names))
        archives = [files[name] for name in names]
        for archive in filter(None, archives):
            read_weights(archive)  # its errors come before the base model is loaded
        base = BaseModel.from_environment()
        fast = load_fast_lora(base, console) if request.go_fast else None
        image = ImageGenerator(base, console, fast).generate(request, *archives)
        folder = kept.enter_context(tempfile.TemporaryDirectory(prefix=".placeholder-", dir=output.parent))
        save_image(image, request, Path(folder)).replace(output)
    return output


COMMANDS = {"train": train, "predict": predict}


def main(arguments: Sequence[str] | None = None, commands: dict[str, Callable] = COMMANDS) -> int:
    """Run a command; returns the exit code. The log goes to stderr, the path of the written file to stdout."""
    given = vars(parser().parse_args(with_hyphens(sys.argv[1:] if arguments is None else arguments)))
    console = Console(sys.stderr)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        written = commands[given.pop("command")](given, console)
        if written is not None:
            print(written)
    except (ValueError, RuntimeError, OSError) as error:
        console.end(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        console.end("interrupted")
        return 128 + signal.SIGINT
    return 0


def _terminated(number: int, _frame: object) -> NoReturn:
    """End as Ctrl-C does: clean up, and leave a last checkpoint of a training."""
    sys.exit(128 + number)

"""Training and prediction without Cog: a command with the options that train.py and predict.py declare as inputs.

The libraries that take seconds to import are imported by the command that needs them, so that --help does not.
"""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from placeholder.config import YAML_SECTIONS, train_config
from placeholder.request import image_request
from placeholder.service.console import Console
from placeholder.service.options import SECRET, declared, parser

SUFFIXES = {".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg", ".png": "png"}


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

    A secret such as hf_token is what the environment variable of its name, HF_TOKEN, holds.
    """
    inputs = {}
    for name, option in declared(command).items():
        value = os.environ.get(name.upper()) if option.kind == SECRET else given.get(name, option.default)
        if option.kind == "Path":
            value = _path(value) if value else None
        inputs[name] = value
    return inputs


def _path(value: str) -> Path | str:
    """Absolute, because the processes of a training run in another folder; a URL as it is."""
    return value if value.startswith(("http://", "https://")) else Path(value).absolute()


def output_path(value: str, overwrite: bool) -> Path:
    """Where to write. Raises ValueError where that cannot be, before any work is done."""
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
    """The format that the suffix of the output asks for; None where no output is given."""
    output, wanted = given.get("output"), given.get("output_format")
    if output is None:
        return wanted
    found = SUFFIXES.get(Path(output).suffix.lower(), wanted)
    if found is None:
        raise ValueError(f"output {output} has no suffix of a picture: end it in .webp, .jpg or .png, or give --output-format")
    if wanted not in (None, found):
        raise ValueError(f"output {output} is a {found} by its name and --output-format is {wanted}: give one of them")
    return found


def train(given: dict[str, Any], console: Console) -> Path | None:
    """A whole training; returns where the archive is, in the process that is to use it."""
    inputs = inputs_of("train", given)
    if not inputs["dataset"]:
        raise ValueError("dataset is missing: give a zip or tar of jpg, png or webp pictures")
    config = train_config({name: inputs[name] for names in YAML_SECTIONS.values() for name in names}, inputs["config"])
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes that train together
    output = Path(given.get("output", "weights.zip")).absolute()
    if first:
        output = output_path(given.get("output", "weights.zip"), given.get("overwrite", False))

    from placeholder.job import CheckpointFolder, Job, WandbTarget
    from placeholder.service import launch

    repository = None
    if inputs["hf_repo_id"] and first:
        from placeholder.report.hub import HubRepository

        repository = HubRepository.of(inputs["hf_repo_id"], inputs["hf_token"])
        repository.check()
    names = [inputs[name] for name in ("wandb_project", "wandb_run", "wandb_entity")]
    target = WandbTarget.of(inputs["wandb_api_key"], *names) if any(names) else None  # a key alone may be there for others
    checkpoints = CheckpointFolder.of(inputs["checkpoint_folder"], inputs["checkpoint_every"], config.steps)
    try:
        if not launch.train(Job(inputs["dataset"], config, output, inputs["resume_from"], checkpoints, target), console):
            return None
    except (KeyboardInterrupt, SystemExit):
        if checkpoints is not None and (stored := sorted(checkpoints.path.glob("checkpoint-*.safetensors"))):
            console.end(f"--resume-from {shlex.quote(str(stored[-1]))} goes on from the last checkpoint")
        raise
    if repository:
        repository.upload(output, console)
    return output


def predict(given: dict[str, Any], console: Console) -> Path:
    """A whole prediction; returns where the picture is."""
    found = output_format(given)
    inputs = inputs_of("predict", given | ({"output_format": found} if found else {}))
    paths = [inputs.pop(name) for name in ("replicate_weights", "extra_lora_weights")]
    request = image_request(inputs)
    output = output_path(given.get("output", f"output.{request.output_format}"), given.get("overwrite", False))

    from placeholder.generate import ImageGenerator, save_image
    from placeholder.lora.distilled import load_fast_lora
    from placeholder.model.base import BaseModel
    from placeholder.service.files import local_file
    from placeholder.weights.archive import read_weights

    with ExitStack() as kept:
        archives = [kept.enter_context(local_file(str(path))) if path else None for path in paths]
        for archive in filter(None, archives):
            read_weights(archive)  # what is wrong with it is said before the base model is loaded
        base = BaseModel.from_environment()
        fast = load_fast_lora(base, console) if request.go_fast else None
        image = ImageGenerator(base, console, fast).generate(request, *archives)
        folder = kept.enter_context(tempfile.TemporaryDirectory(prefix=".placeholder-", dir=output.parent))
        save_image(image, request, Path(folder)).replace(output)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. The log goes to stderr, the path of what was written to stdout."""
    given = vars(parser().parse_args(with_hyphens(sys.argv[1:] if arguments is None else arguments)))
    console = Console(sys.stderr)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        written = {"train": train, "predict": predict}[given.pop("command")](given, console)
        if written:
            print(written)
    except (ValueError, RuntimeError, OSError) as error:
        console.end(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        console.end("interrupted")
        return 128 + signal.SIGINT
    return 0


def _terminated(number: int, _frame: object) -> NoReturn:
    """End as Ctrl-C does, so that what is under way is tidied up and a training leaves its last checkpoint."""
    sys.exit(128 + number)

"""The parser of the command line: the inputs of training and prediction as options, and where to write."""

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from pydantic import SecretStr

from placeholder.job import TRAIN_INPUTS
from placeholder.options import Option, options_of
from placeholder.request import Request

PROGRAM = "python -m placeholder"
INPUTS: dict[str, dict[str, Option]] = {"train": TRAIN_INPUTS, "predict": options_of(Request)}
POSITIONAL = {"train": "dataset", "predict": "prompt"}
DESCRIPTIONS = {
    "train": "Train a LoRA, and optionally a placeholder token, on images; writes the weights archive.",
    "predict": "Generate one image, with trained weights or with the base model alone.",
}
OUTPUTS = {"train": "weights.zip", "predict": "output.webp, or as --output-format says; a suffix says the format too"}
MODEL_HELP = "QWEN_IMAGE_MODEL: base model, a folder or a repository on the Hugging Face Hub, with @revision if need be."
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def parser() -> Parser:
    """The parser of both commands. Options that are not given are not among its results."""
    both = Parser(PROGRAM, description="Teach Qwen-Image a new subject, and generate images of it.", allow_abbrev=False)
    commands = both.add_subparsers(dest="command", metavar="command", required=True)
    for name, description in DESCRIPTIONS.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            usage=f"%(prog)s {POSITIONAL[name]} [-o FILE] [options]",
            epilog=_environment(name),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        )
        _add_inputs(command, name)
    return both


def _environment(name: str) -> str:
    """The part of --help on environment variables: the secrets, and the base model."""
    secrets = [f"{option.name.upper()}: {option.description}" for option in INPUTS[name].values() if option.kind is SecretStr]
    return " ".join(["Environment:", *secrets, MODEL_HELP])


def _add_inputs(command: Parser, name: str) -> None:
    positional = INPUTS[name][POSITIONAL[name]]
    command.add_argument(positional.name, help=_help(positional))
    command.add_argument("-o", "--output", metavar="FILE", help=f"File to write. [default {OUTPUTS[name]}]")
    command.add_argument("--overwrite", action="store_true", help="Replace the file where it exists.")
    groups: dict[str, Any] = {}
    for option in INPUTS[name].values():
        if option is positional or option.kind is SecretStr:
            continue  # other users see a command line: secrets come from the environment
        if option.heading not in groups:
            groups[option.heading] = command.add_argument_group(option.heading)
        flag = "--" + option.name.replace("_", "-")
        groups[option.heading].add_argument(flag, dest=option.name, help=_help(option), **_kind(option))


def _kind(option: Option) -> dict[str, Any]:
    """How argparse reads the option. Ranges and choices are checked later, as those of every input are."""
    if option.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else METAVARS[option.kind]
    return {"type": option.kind if option.kind in (int, float) else str, "metavar": metavar}


def _help(option: Option) -> str:
    facts = []
    if option.low is not None:
        facts.append(f"{option.low:g} to {option.high:g}" if option.kind is float else f"{option.low} to {option.high}")
    if option.default not in (None, ""):
        facts.append(f"default {_shown(option.default)}")
    return (option.description + (f" [{', '.join(facts)}]" if facts else "")).replace("%", "%%")


def _shown(value: Any) -> str:
    """A value as it is typed; a flag's as on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))

"""The options of the command line: those that train.py and predict.py declare as inputs, and where to write."""

import argparse
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

from placeholder.service.inputs import DeclaredInput, declared_inputs

PROGRAM = "python -m placeholder"
SOURCES = {"train": ("train.py", "train"), "predict": ("predict.py", "predict")}
POSITIONAL = {"train": "dataset", "predict": "prompt"}
# The headings of --help; an input that is named nowhere stands under the first one.
GROUPS: dict[str, dict[str, str]] = {
    "train": {
        "the LoRA": "",
        "the new token": "train_placeholder_token placeholder_token placeholder_vectors placeholder_init_std placeholder_learning_rate "
        "placeholder_warmup_fraction prior_preservation prior_preservation_interval class_word",
        "captions": "default_caption autocaption autocaption_prefix autocaption_suffix caption_dropout log_prompt_ids",
        "memory and speed": "quantize quantize_te torch_compile",
        "interruptions and settings": "resume_from checkpoint_folder checkpoint_every config",
        "what it shows": "report sample_every sample_prompts hf_repo_id wandb_project wandb_run wandb_entity",
    },
    "predict": {
        "drawing": "",
        "weights": "replicate_weights lora_scale extra_lora_weights extra_lora_scale",
        "size": "width height aspect_ratio image_size",
        "file": "output_format output_quality",
    },
}
DESCRIPTIONS = {
    "train": "Train a LoRA, and optionally a fresh token, on pictures; writes the weights archive.",
    "predict": "Draw one picture, with the weights of a training or with the base model alone.",
}
MODEL_HELP = (
    "QWEN_IMAGE_MODEL names another base model: a folder, or a repository of the hub, with @ and a revision if need be."
)
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "FILE"}
SECRET = "Secret"
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def parser() -> Parser:
    """The parser of both commands. What was not given is not among its results."""
    whole = Parser(PROGRAM, description="Teach Qwen-Image a new subject, and draw it.", allow_abbrev=False)
    commands = whole.add_subparsers(dest="command", metavar="command", required=True)
    for name, description in DESCRIPTIONS.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            usage=f"%(prog)s {POSITIONAL[name]} [-o FILE] [options]",
            epilog=_environment(declared(name)),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        )
        _add_inputs(command, name)
    return whole


def declared(command: str) -> dict[str, DeclaredInput]:
    """The inputs that a command takes."""
    return declared_inputs(*SOURCES[command])


def _environment(inputs: dict[str, DeclaredInput]) -> str:
    """What the environment says beside the options: the secrets, and the base model."""
    secrets = [f"{option.name.upper()}: {option.description}" for option in inputs.values() if option.kind == SECRET]
    return " ".join(["Environment:", *secrets, MODEL_HELP])


def _add_inputs(command: Parser, name: str) -> None:
    inputs = declared(name)
    positional = inputs.pop(POSITIONAL[name])
    command.add_argument(positional.name, help=_help(positional))
    default = "weights.zip" if name == "train" else "output.webp, or as --output-format says; a suffix says the format too"
    command.add_argument("-o", "--output", metavar="FILE", help=f"What to write. [default {default}]")
    command.add_argument("--overwrite", action="store_true", help="Replace what is there under that name.")
    first, *_ = GROUPS[name]
    titles = {option: title for title, options in GROUPS[name].items() for option in options.split()}
    groups = {title: command.add_argument_group(title) for title in GROUPS[name]}
    for option in inputs.values():
        if option.kind == SECRET:
            continue  # other users see a command line: it comes from the environment
        group = groups[titles.get(option.name, first)]
        group.add_argument("--" + option.name.replace("_", "-"), dest=option.name, help=_help(option), **_kind(option))


def _kind(option: DeclaredInput) -> dict[str, Any]:
    """How argparse reads the option. Ranges are left to the checks that every way in goes through."""
    if option.kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    metavar = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else METAVARS[option.kind]
    return {"type": KINDS.get(option.kind, str), "choices": option.choices, "metavar": metavar}


def _help(option: DeclaredInput) -> str:
    facts = []
    if option.ge is not None:
        facts.append(f"{_shown(option.ge)} to {_shown(option.le)}")
    if option.default not in (None, ""):
        facts.append(f"default {_shown(option.default)}")
    return (option.description + (f" [{', '.join(facts)}]" if facts else "")).replace("%", "%%")


def _shown(value: Any) -> str:
    """A value as it is typed; a flag's as on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))

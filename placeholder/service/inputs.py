"""The inputs that train.py and predict.py declare, read from their text: nothing is imported, neither Cog nor torch."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class DeclaredInput:
    """One input: its type (`str`, `int`, `float`, `bool`, `Path` or `Secret`, of which None is one value more where that is the default)
    and what its `Input(...)` says."""

    name: str
    kind: str
    description: str
    required: bool = False
    default: Any = None
    ge: float | None = None
    le: float | None = None
    choices: list[Any] | None = None
    deprecated: bool = False


def declared_inputs(file: str, function: str) -> dict[str, DeclaredInput]:
    """The inputs of a function in a file beside the package, by name and in their order."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments = [argument for argument in found.args.args if argument.arg != "self"]
    return {argument.arg: _declared(argument, call) for argument, call in zip(arguments, found.args.defaults, strict=True)}


def _declared(argument: ast.arg, call: ast.Call) -> DeclaredInput:
    kind = ast.unparse(argument.annotation).removeprefix("Optional[").removesuffix("]")
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return DeclaredInput(argument.arg, kind, required="default" not in said, **said)

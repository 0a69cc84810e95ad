"""The inputs of train.py and predict.py: literals that Cog's schema generator can read, and the declared options."""

import ast
from typing import Any

import pytest
from pydantic import SecretStr

from demo.server import ROOT
from placeholder.config import OPTIONS
from placeholder.job import TRAIN_INPUTS as TRAIN_OPTIONS
from placeholder.options import Option, options_of
from placeholder.request import Request, image_request

Declared = dict[str, tuple[str, dict[str, ast.expr]]]
PREDICT_OPTIONS = options_of(Request)


def declared(file: str, function: str) -> tuple[ast.FunctionDef, Declared]:
    """The function, and for each input its annotation and the keywords of its Input(...)."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments = [argument for argument in found.args.args if argument.arg != "self"]
    assert not (found.args.kwonlyargs or found.args.vararg or found.args.kwarg)
    assert len(arguments) == len(found.args.defaults), "every input has an Input(...)"
    inputs = {}
    for argument, default in zip(arguments, found.args.defaults, strict=True):
        assert isinstance(default, ast.Call), argument.arg
        assert ast.unparse(default.func) == "Input", argument.arg
        assert not default.args, argument.arg
        inputs[argument.arg] = (ast.unparse(argument.annotation), {keyword.arg: keyword.value for keyword in default.keywords})
    return found, inputs


def defaults(inputs: Declared) -> dict[str, Any]:
    """The default of every input that has one."""
    return {name: ast.literal_eval(keywords["default"]) for name, (_, keywords) in inputs.items() if "default" in keywords}


TRAIN, TRAIN_INPUTS = declared("train.py", "train")
PREDICT, PREDICT_INPUTS = declared("predict.py", "predict")
TRAIN_DEFAULTS = {name: value for name, value in defaults(TRAIN_INPUTS).items() if name in OPTIONS}
WEIGHTS = ("replicate_weights", "extra_lora_weights")
PREDICT_DEFAULTS = {name: value for name, value in defaults(PREDICT_INPUTS).items() if name not in WEIGHTS}
EVERY_INPUT = [
    pytest.param(options.get(name), *found, id=f"{function}-{name}")
    for function, inputs, options in (("train", TRAIN_INPUTS, TRAIN_OPTIONS), ("predict", PREDICT_INPUTS, PREDICT_OPTIONS))
    for name, found in inputs.items()
]


def test_the_inputs_are_the_declared_options():
    assert set(TRAIN_INPUTS) == set(TRAIN_OPTIONS)
    assert list(PREDICT_INPUTS) == list(PREDICT_OPTIONS)


@pytest.mark.parametrize(("option", "annotation", "keywords"), EVERY_INPUT)
def test_an_input_says_what_its_option_declares(option: Option, annotation, keywords):
    kind = "Secret" if option.kind is SecretStr else option.kind.__name__
    assert annotation == (f"Optional[{kind}]" if option.blank else kind)
    found = {name: ast.literal_eval(value) for name, value in keywords.items()}
    required = option.default is None and not option.blank
    wanted = {"description": option.description} | ({} if required else {"default": option.default})
    wanted |= {"ge": option.low, "le": option.high} if option.low is not None else {}
    wanted |= {"choices": list(option.choices)} if option.choices else {}
    wanted |= {"deprecated": True} if option.deprecated else {}
    assert found == wanted
    assert type(found.get("default")) is type(wanted.get("default"))
    for name, value in keywords.items():  # an expression is dropped by the generator, or makes the input required
        assert isinstance(value, ast.Constant | ast.List) or name in ("ge", "le"), name


@pytest.mark.parametrize(("option", "annotation", "keywords"), EVERY_INPUT)
def test_a_description_is_one_literal_without_concatenation(option, annotation, keywords):
    files = (ROOT / "train.py").read_text(encoding="utf-8") + (ROOT / "predict.py").read_text(encoding="utf-8")
    # Pieces that Python would join, and escapes, do not stand in the text as one.
    assert f'description="{keywords["description"].value}"' in files


@pytest.mark.parametrize("file", ["train.py", "predict.py"])
def test_cogs_names_are_imported_without_alias_and_inputs_stand_in_signatures_alone(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    imports = [
        alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "cog" for alias in node.names
    ]
    assert {"Input", "Path"} <= {alias.name for alias in imports}
    assert all(alias.asname is None for alias in imports)
    assigned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)]
    assert not any(isinstance(value, ast.Call) and ast.unparse(value.func) == "Input" for value in assigned)


def test_both_functions_return_what_cog_can_describe():
    assert ast.unparse(TRAIN.returns) == "TrainingOutput"
    assert ast.unparse(PREDICT.returns) == "Path"


@pytest.mark.parametrize("name", sorted(PREDICT_DEFAULTS.keys() - {"width", "height"}))
def test_every_prediction_input_changes_the_request(name):
    option, plain = PREDICT_OPTIONS[name], {"prompt": "a dog"} | PREDICT_DEFAULTS
    other = option.choices[-1] if option.choices else option.high or ("<x>" if option.kind is str else not option.default)
    assert image_request(plain | {name: other}) != image_request(plain)

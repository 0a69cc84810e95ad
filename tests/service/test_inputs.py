"""The declarations in train.py and predict.py, read from their text as Cog's schema generator reads them."""

import ast
from typing import Any

import pytest

from demo.server import ROOT
from placeholder.config import BATCH_SIZES, OPTIMIZERS, YAML_SECTIONS, TrainConfig, train_config
from placeholder.request import OUTPUT_FORMATS, SIZES, image_request
from train import FILES

TYPES = {
    "str",
    "int",
    "float",
    "bool",
    "Path",
    "Optional[str]",
    "Optional[Secret]",
    "Optional[int]",
    "Optional[float]",
    "Optional[bool]",
    "Optional[Path]",
}
KEYWORDS = {"default", "description", "ge", "le", "choices", "deprecated"}


def declared(file: str, function: str) -> tuple[ast.FunctionDef, dict[str, tuple[str, dict[str, ast.expr]]]]:
    """The function, and for each input its annotation and the keywords of its Input(...)."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments = [argument for argument in found.args.args if argument.arg != "self"]
    assert not found.args.kwonlyargs
    assert not found.args.vararg
    assert not found.args.kwarg
    assert len(arguments) == len(found.args.defaults), "every input has an Input(...)"
    inputs = {}
    for argument, default in zip(arguments, found.args.defaults, strict=True):
        assert isinstance(default, ast.Call), argument.arg
        assert ast.unparse(default.func) == "Input", argument.arg
        assert not default.args, argument.arg
        inputs[argument.arg] = (ast.unparse(argument.annotation), {keyword.arg: keyword.value for keyword in default.keywords})
    return found, inputs


TRAIN, TRAIN_INPUTS = declared("train.py", "train")
PREDICT, PREDICT_INPUTS = declared("predict.py", "predict")
EVERY_INPUT = [
    pytest.param(name, annotation, keywords, id=f"{function}-{name}")
    for function, inputs in (("train", TRAIN_INPUTS), ("predict", PREDICT_INPUTS))
    for name, (annotation, keywords) in inputs.items()
]


def defaults(inputs: dict) -> dict[str, Any]:
    """The default of every input that has one."""
    return {name: ast.literal_eval(keywords["default"]) for name, (_, keywords) in inputs.items() if "default" in keywords}


TRAIN_DEFAULTS = {name: value for name, value in defaults(TRAIN_INPUTS).items() if name not in FILES}
WEIGHTS = ("replicate_weights", "extra_lora_weights")
PREDICT_DEFAULTS = {name: value for name, value in defaults(PREDICT_INPUTS).items() if name not in WEIGHTS}


@pytest.mark.parametrize(("name", "annotation", "keywords"), EVERY_INPUT)
def test_an_input_is_declared_as_the_schema_generator_can_read_it(name, annotation, keywords):
    assert annotation in TYPES
    assert set(keywords) <= KEYWORDS
    description = keywords["description"]
    assert isinstance(description, ast.Constant)
    assert isinstance(description.value, str)
    assert "\\" not in ast.unparse(description)
    for bound in keywords.keys() & {"ge", "le"}:
        assert isinstance(keywords[bound], ast.Constant), "an expression is dropped"
        assert isinstance(keywords[bound].value, int | float)
    if "choices" in keywords:
        assert isinstance(keywords["choices"], ast.List)
        assert all(isinstance(choice, ast.Constant) for choice in keywords["choices"].elts)
    if "default" in keywords:
        default = keywords["default"]
        assert isinstance(default, ast.Constant), "an expression makes the input required"
        assert (default.value is None) == annotation.startswith("Optional["), "None without Optional makes the input required"


@pytest.mark.parametrize(("name", "annotation", "keywords"), EVERY_INPUT)
def test_a_description_is_one_literal_without_concatenation(name, annotation, keywords):
    files = (ROOT / "train.py").read_text(encoding="utf-8") + (ROOT / "predict.py").read_text(encoding="utf-8")
    # Pieces that Python would join do not stand in the text as one.
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


def test_choices_of_one_name_are_the_same_in_training_and_prediction():
    for name in TRAIN_INPUTS.keys() & PREDICT_INPUTS.keys():
        found = [ast.unparse(inputs[name][1].get("choices", ast.Constant(None))) for inputs in (TRAIN_INPUTS, PREDICT_INPUTS)]
        assert found[0] == found[1]


def test_the_defaults_of_the_training_inputs_are_those_of_the_configuration():
    assert train_config(TRAIN_DEFAULTS) == TrainConfig()


def test_the_training_inputs_are_exactly_the_options_of_the_configuration():
    options = {name for names in YAML_SECTIONS.values() for name in names}
    assert set(TRAIN_INPUTS) == options | set(FILES)


OTHER_VALUES = {
    "steps": 1,
    "rank": 1,
    "lora_rank": 8,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "resolution": "64",
    "default_caption": "a photo",
    "autocaption": True,
    "autocaption_prefix": "a photo of <>",
    "autocaption_suffix": "35mm",
    "caption_dropout": 0.0,
    "train_placeholder_token": True,
    "placeholder_token": "<qrs>",
    "placeholder_vectors": 2,
    "placeholder_init_std": 0.0,
    "placeholder_learning_rate": 1e-2,
    "placeholder_warmup_fraction": 0.5,
    "prior_preservation": 0.0,
    "prior_preservation_interval": 2,
    "class_word": "person",
    "optimizer": "prodigy",
    "quantize": True,
    "quantize_te": True,
    "torch_compile": True,
    "log_prompt_ids": True,
    "seed": 0,
    "report": False,
    "sample_every": 100,
    "sample_prompts": "a cat",
}


@pytest.mark.parametrize("name", TRAIN_DEFAULTS)
def test_every_training_input_changes_the_configuration(name):
    needed = {"autocaption": True} if name.startswith("autocaption_") else {}
    assert train_config(TRAIN_DEFAULTS | needed | {name: OTHER_VALUES[name]}) != train_config(TRAIN_DEFAULTS | needed)


OTHER_REQUESTS = {
    "prompt": "a cat",
    "negative_prompt": "blurry",
    "steps": 1,
    "num_inference_steps": 1,
    "guidance": 1.0,
    "guidance_scale": 1.0,
    "aspect_ratio": "1:1",
    "image_size": "optimize_for_speed",
    "seed": 0,
    "lora_scale": 0.5,
    "extra_lora_scale": 0.5,
    "enhance_prompt": True,
    "go_fast": True,
    "output_format": "png",
    "output_quality": 1,
}


@pytest.mark.parametrize("name", OTHER_REQUESTS)
def test_every_prediction_input_changes_the_request(name):
    plain = {"prompt": "a dog"} | PREDICT_DEFAULTS
    assert set(plain) == set(OTHER_REQUESTS) | {"width", "height"}
    assert image_request(plain | {name: OTHER_REQUESTS[name]}) != image_request(plain)


def bounded(inputs: dict, skip: set[str]) -> list:
    """Each numeric input with its lowest and highest value."""
    return [
        pytest.param(name, ast.literal_eval(keywords["ge"]), ast.literal_eval(keywords["le"]), id=name)
        for name, (annotation, keywords) in inputs.items()
        if ("int" in annotation or "float" in annotation) and "choices" not in keywords and name not in skip
    ]


@pytest.mark.parametrize(("name", "low", "high"), bounded(TRAIN_INPUTS, {"checkpoint_every"}))
def test_the_range_of_a_training_input_is_the_one_that_is_checked(name, low, high):
    for accepted in (low, high):
        train_config(TRAIN_DEFAULTS | {name: accepted})
    for refused in (low - 1e-9 - low * 0.01, high * 1.01):
        with pytest.raises(ValueError, match="give a"):
            train_config(TRAIN_DEFAULTS | {name: refused})


@pytest.mark.parametrize(("name", "low", "high"), bounded(PREDICT_INPUTS, set()))
def test_the_range_of_a_prediction_input_is_the_one_that_is_checked(name, low, high):
    plain = {"prompt": "a dog"} | PREDICT_DEFAULTS
    if name in ("width", "height"):
        plain |= {"width": 64, "height": 64}
    for accepted in (low, high):
        image_request(plain | {name: accepted})
    for refused in (low - 1, high + 1):
        with pytest.raises(ValueError, match="give a"):
            image_request(plain | {name: refused})


@pytest.mark.parametrize(
    ("inputs", "name", "accepted"),
    [
        (TRAIN_INPUTS, "batch_size", BATCH_SIZES),
        (TRAIN_INPUTS, "optimizer", OPTIMIZERS),
        (PREDICT_INPUTS, "output_format", OUTPUT_FORMATS),
        (PREDICT_INPUTS, "image_size", tuple(SIZES)),
        (PREDICT_INPUTS, "aspect_ratio", tuple(SIZES["optimize_for_speed"])),
    ],
)
def test_the_choices_of_an_input_are_those_that_are_checked(inputs, name, accepted):
    assert tuple(ast.literal_eval(inputs[name][1]["choices"])) == accepted


def test_the_hosted_models_inputs_are_offered():
    hosted = (
        "prompt enhance_prompt negative_prompt aspect_ratio image_size width height go_fast num_inference_steps guidance seed"
    )
    assert set(f"{hosted} output_format output_quality replicate_weights lora_scale".split()) <= set(PREDICT_INPUTS)
    hosted = "dataset steps learning_rate lora_rank default_caption batch_size optimizer seed"
    assert set(hosted.split()) <= set(TRAIN_INPUTS)

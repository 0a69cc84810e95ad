"""Requests to the hosted qwen/qwen-image-lora are taken as they are: inputs, ranges, choices, sizes, documented examples.

tests/journeys/test_journey.py sends the examples through the real server.
"""

import ast
from typing import Any

import pytest

from placeholder.config import train_config
from placeholder.request import image_request
from tests.service.test_inputs import PREDICT_DEFAULTS, PREDICT_INPUTS, TRAIN_DEFAULTS, TRAIN_INPUTS
from tests.support import hosted

EVERY_INPUT = [
    pytest.param(ours[name], *declared, name, id=f"{kind}-{name}")
    for kind, ours, theirs in (
        ("train", TRAIN_INPUTS, hosted.TRAIN_INPUTS),
        ("predict", PREDICT_INPUTS, hosted.PREDICT_INPUTS),
    )
    for name, declared in theirs.items()
]


def literal(keywords: dict[str, ast.expr], name: str) -> Any:
    """The value of a keyword of an Input; None where it is not given."""
    return ast.literal_eval(keywords[name]) if name in keywords else None


@pytest.mark.parametrize(("ours", "kind", "default", "accepted", "name"), EVERY_INPUT)
def test_an_input_is_declared_at_least_as_wide_as_the_hosted_one(ours, kind, default, accepted, name):
    annotation, keywords = ours
    assert annotation in (kind, f"Optional[{kind}]")
    if isinstance(accepted, list):
        assert set(accepted) <= set(literal(keywords, "choices"))
    elif accepted:
        assert literal(keywords, "ge") <= accepted[0]
        assert literal(keywords, "le") >= accepted[1]
    else:
        assert "choices" not in keywords
    if name == "num_inference_steps":  # another name of steps
        assert literal(PREDICT_INPUTS["steps"][1], "default") == default
    elif name != "prompt":
        assert literal(keywords, "default") == hosted.OTHER_DEFAULTS.get(name, default)


def picture(request: dict[str, Any]):
    """What a request asks for, with the declared defaults of what it does not give, as Cog fills them in."""
    return image_request(PREDICT_DEFAULTS | {"prompt": "a cat"} | request)


@pytest.mark.parametrize(("size", "ratio"), hosted.SIZES)
def test_a_size_by_name_is_that_of_the_hosted_model(size, ratio):
    found = picture({"image_size": size, "aspect_ratio": ratio})
    assert (found.width, found.height, found.steps, found.guidance) == (*hosted.SIZES[size, ratio], 50, 4.0)


@pytest.mark.parametrize("request_", hosted.TRAININGS.values(), ids=hosted.TRAININGS)
def test_a_documented_training_asks_for_what_it_says(request_):
    config = train_config(TRAIN_DEFAULTS | request_)
    given = {name: value for name, value in request_.items() if name != "placeholder_token"}
    assert {name: getattr(config, name) for name in given} == given
    assert config.tokens == (("<zwx>",) if "placeholder_token" in request_ else ())


@pytest.mark.parametrize("request_", hosted.PREDICTIONS.values(), ids=hosted.PREDICTIONS)
def test_a_documented_prediction_asks_for_what_it_says(request_):
    found = picture(request_)
    fields = {{"guidance_scale": "guidance"}.get(name, name): value for name, value in request_.items()}
    assert {name: getattr(found, name) for name in fields} == fields
    if "width" not in request_:
        assert (found.width, found.height) == (1664, 928)

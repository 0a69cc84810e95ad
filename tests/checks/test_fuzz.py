"""A fixed hundred of each kind of mutated input, and values that hypothesis thinks of."""

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.fuzz import Target, fit_for_a_log, run
from placeholder.config import YAML_SECTIONS, TrainConfig, train_config
from placeholder.tokens.vocabulary import check_tokens
from placeholder.weights.archive import META_NAME, read_weights
from tests.support.samples import write_zip
from tests.weights.test_archive import GOOD

FEW = settings(derandomize=True, deadline=None, max_examples=100, database=None)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=5)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=8
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.sampled_from([name for names in YAML_SECTIONS.values() for name in names])


@pytest.fixture(scope="module")
def target(base, tmp_path_factory) -> Target:
    """What the cases are tried on."""
    return Target(base, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["weights", "dataset", "yaml"])
def test_a_hundred_mutated_inputs_are_accepted_or_refused_by_a_sentence(kind, target):
    lines: list[str] = []
    failed = run(target, kind, range(100), lines.append)
    assert not failed, "\n".join(lines)
    accepted = int(lines[0].split(" accepted")[0].split()[-1])
    assert 5 <= accepted <= 80, "either kind of ending should be common"


def refusal(read, *arguments) -> str | None:
    """The sentence by which the arguments are refused, None where they are accepted."""
    try:
        read(*arguments)
    except ValueError as error:
        assert type(error) is ValueError
        assert fit_for_a_log(str(error))
        return str(error)
    return None


@FEW
@given(
    document=st.dictionaries(
        st.sampled_from(list(YAML_SECTIONS)) | SCALARS,
        st.dictionaries(OPTIONS | SCALARS, NESTED, max_size=3) | NESTED,
        max_size=3,
    )
    | NESTED
)
def test_any_yaml_document_gives_a_configuration_or_a_sentence(document):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(document, allow_unicode=False))
        if not refusal(train_config, {}, path):
            assert isinstance(train_config({}, path), TrainConfig)


@FEW
@given(option=OPTIONS, value=NESTED)
def test_any_value_of_any_option_gives_a_configuration_or_a_sentence(option, value):
    refusal(train_config, {option: value})


@FEW
@given(
    meta=JSON
    | st.fixed_dictionaries({"placeholder_token_ids": JSON, "base_model": JSON})
    | st.builds(lambda ids: {"placeholder_token_ids": {"<zwx>": ids}}, JSON)
)
def test_any_meta_json_is_read_or_gets_a_sentence(meta):
    with tempfile.TemporaryDirectory() as folder:
        path = write_zip(Path(folder) / "weights.zip", GOOD | {META_NAME: json.dumps(meta).encode()})
        refusal(read_weights, path)


@FEW
@given(tokens=st.lists(st.text(max_size=8) | st.builds("<{}>".format, st.text(max_size=4)), max_size=3))
def test_any_tokens_are_accepted_or_get_a_sentence(tokens, tokenizer):
    refusal(check_tokens, tuple(tokens), tokenizer)

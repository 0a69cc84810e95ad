"""Inputs and YAML file into one validated configuration."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placeholder.config import OPTIONS, YAML_SECTIONS, TrainConfig, config_yaml, train_config
from placeholder.options import MAX_TEXT_CHARACTERS, read_sections


@pytest.fixture
def yaml_file(tmp_path):
    """Writes the text of a YAML file and returns its path."""

    def write(text: str | bytes):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_no_input_at_all_gives_the_defaults():
    assert train_config({}) == TrainConfig()
    assert TrainConfig().training_mode == "baseline"
    assert TrainConfig().tokens == ()


def test_every_option_stands_in_one_section_of_the_yaml_file():
    in_sections = [name for names in YAML_SECTIONS.values() for name in names]
    assert len(in_sections) == len(set(in_sections))
    assert set(in_sections) == set(OPTIONS) == {field.name for field in fields(TrainConfig)} | {"lora_rank"}
    assert YAML_SECTIONS["model"] == ("quantize", "quantize_te", "torch_compile", "deterministic")
    assert YAML_SECTIONS["debug"] == ("log_prompt_ids",)


def test_the_options_as_inputs_have_what_cog_can_show_as_their_defaults():
    defaults = {name: option.default for name, option in OPTIONS.items()}
    assert defaults["resolution"] == "512,768,1024"
    assert defaults["placeholder_token"] is defaults["train_placeholder_token"] is defaults["lora_rank"] is None
    assert train_config(defaults) == TrainConfig()


@pytest.mark.parametrize(
    ("train", "named", "tokens"),
    [
        (None, None, ()),
        (None, "<zwx>", ("<zwx>",)),
        (True, None, ("<zwx>",)),
        (True, "<abc>", ("<abc>",)),
        (False, "<abc>", ()),
        (False, None, ()),
        (True, "<zwx>,<qrs>", ("<zwx>", "<qrs>")),
        (True, " <zwx> , <qrs>", ("<zwx>", "<qrs>")),
        (None, ["<zwx>", "<qrs>"], ("<zwx>", "<qrs>")),
        (None, "", ()),
        ("", "<zwx>", ("<zwx>",)),
    ],
)
def test_a_token_is_trained_when_asked_for_or_left_blank_and_named(train, named, tokens):
    config = train_config({"train_placeholder_token": train, "placeholder_token": named})
    assert config.tokens == tokens
    assert config.training_mode == ("zero_prior" if tokens else "baseline")


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({}, 0.0),
        ({"token_gate": False}, 4.0),
        ({"token_gate": False, "prior_preservation": 0}, 0.0),
        ({"prior_preservation": 2}, 2.0),
    ],
)
def test_without_the_token_gate_the_prior_is_preserved_unless_told_otherwise(given, weight):
    assert train_config({"placeholder_token": "<zwx>", "prior_preservation": None} | given).prior_preservation == weight
    assert train_config(given).prior_preservation == given.get("prior_preservation", 0.0)  # without a token


def test_lora_rank_counts_where_it_is_given():
    assert train_config({"rank": 32, "lora_rank": None}).rank == 32
    assert train_config({"rank": 32, "lora_rank": 8}).rank == 8


@pytest.mark.parametrize(
    ("given", "sides"),
    [("512,768,1024", (512, 768, 1024)), ("64", (64,)), (" 128, 64 ,64", (64, 128)), (64, (64,)), ([96, "64"], (64, 96))],
)
def test_resolution_is_a_sorted_set_of_sides(given, sides):
    assert train_config({"resolution": given}).resolution == sides


def test_lists_in_the_yaml_file_and_a_comma_at_the_end_are_taken(yaml_file):
    listed = yaml_file("train: {sample_prompts: [a <zwx>, b], resolution: [64, 128], placeholder_token: [<zwx>, <qrs>]}")
    assert train_config({}, listed) == train_config(
        {"sample_prompts": "a <zwx>\nb", "resolution": "64,128", "placeholder_token": "<zwx>,<qrs>, \n"}
    )
    with pytest.raises(ValueError, match="sample_prompts is .*: give at most 8 prompts, one a line"):
        train_config({}, yaml_file("train: {sample_prompts: [a, 1]}"))


def test_a_yaml_file_may_be_utf_16_as_powershell_writes_it(yaml_file):
    assert train_config({}, yaml_file("train: {class_word: caf\xe9}".encode("utf-16"))).class_word == "caf\xe9"


def test_what_the_yaml_file_does_not_name_stays_as_the_inputs_say(yaml_file):
    config = train_config({"steps": 99, "quantize": True}, yaml_file("train:\n  rank: 4\nmodel:\n"))
    assert (config.steps, config.rank, config.quantize) == (99, 4, True)
    for text in ("", "# nothing\n", "train:\n"):
        assert train_config({}, yaml_file(text)) == TrainConfig()


def test_an_unknown_key_is_refused_with_all_the_known_ones(yaml_file):
    with pytest.raises(ValueError, match=r"config has an unknown key train\.stepz: known are train: steps, rank") as raised:
        train_config({}, yaml_file("train:\n  stepz: 5\n"))
    for names in YAML_SECTIONS.values():
        assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainer:\n  steps: 5", "unknown section 'trainer': known are train, debug, model"),
        ("model:\n  steps: 5", r"unknown key model\.steps"),
        ("train:\n  default_caption: caf\xe9".encode("latin-1"), "config is not a YAML file"),
        ("1: 2", "unknown section 1"),
        ("train: [1, 2]", "config section train holds a list: expected option names with values"),
        ("- train", "config holds a list: expected the sections train, debug, model"),
        ("train: {", "config is not a YAML file"),
        ("train: !!python/object/apply:os.getcwd []", "config is not a YAML file"),
        ("train:\n  steps: 2020-99-99", "config is not a YAML file"),
        ("train:\n  steps: " + "9" * 5000, "config is not a YAML file"),
        ("train:\n  steps: many", "steps is 'many': give a whole number from 1 to 20000"),
        ("train:\n  train_placeholder_token: 1", "train_placeholder_token is 1: give true or false"),
        ("train:\n  placeholder_token: {<a>: <b>}", "placeholder_token is .*: give text, tokens separated by commas"),
        ("train: {steps: 1}\ntrain: {rank: 2}", "config is not a YAML file: train stands twice in one section"),
        ("train:\n  steps: 1\n  rank: 2\n  steps: 3", "config is not a YAML file: steps stands twice in one section"),
        ("a: &a {k: 1}\ntrain: *a", r"config is not a YAML file: tags \(!name\) and aliases \(\*name\) are not read"),
        ("train:\n  steps: !!int ''", "tags .* are not read"),
        ("train:\n  steps: !!bool x", "tags .* are not read"),
        ("train:\n  steps: 1" + ":1" * 5000 + ".5", "config is not a YAML file"),
        ("train:\n  steps: 0x" + "f" * 5000, "steps is too long a number: give a whole number"),
        ('train:\n  "a\\nb": 1', r"unknown key train\.'a\\nb': known are"),
        ("x" * 1000 + ": 1", r"unknown section 'x+\.\.\.x+': known are"),
        ('train:\n  default_caption: "\\ud800"', r"default_caption is '\\ud800': give text"),
        ("#" * 3_000_000, "config is 3000000 bytes: a configuration file has at most 2097152"),
    ],
)
def test_a_wrong_yaml_file_gets_its_sentence(text, sentence, yaml_file):
    with pytest.raises(ValueError, match=sentence):
        train_config({}, yaml_file(text))


def test_a_yaml_file_that_is_not_there_gets_its_sentence(tmp_path):
    with pytest.raises(ValueError, match="config none.yaml is not a file: give a YAML file"):
        train_config({}, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantize_te": True, "placeholder_token": "<zwx>"}, "quantize_te cannot be combined with a placeholder token"),
        ({"sample_every": 4}, "sample_every is 4: with 1000 steps give at least 5, or 0 for no samples"),
        ({"sample_every": 100, "report": False}, "make images for the report, which is off: set report to true"),
        ({"sample_prompts": "a cat", "report": False}, "make images for the report, which is off: set report to true"),
        ({"class_word": "a <> dog"}, "class_word 'a <> dog' holds the token: give what the base model knows, such as dog"),
        ({"class_word": "[Name]"}, r"class_word '\[Name\]' holds the token"),
        ({"placeholder_token": "<a>,,<b>", "sample_every": 4}, "sample_every is 4"),  # and not class_word
        ({"class_word": "<a> dog", "placeholder_token": "<b>,<a>"}, "class_word '<a> dog' holds the token: give what the base"),
        ({"autocaption_prefix": "a photo of"}, "autocaption_prefix is put around the captions of autocaption, which is off"),
        ({"autocaption_suffix": "a photo of"}, "autocaption_suffix is put around the captions of autocaption, which is off"),
    ],
)
def test_options_that_do_not_go_together_get_their_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_config(options)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        # The ranges and choices are those of train.py, which tests/service/test_inputs.py compares.
        ("steps", 20001, "from 1 to 20000"),
        ("lora_rank", 257, "from 1 to 256"),
        ("learning_rate", "fast", "give a number"),
        ("batch_size", 3, "choose one of 1, 2, 4"),
        ("resolution", "63", "give whole numbers from 64 to 2048, separated by commas"),
        *(("resolution", wrong, "separated by commas") for wrong in ("2049", "64,", [], 64.5, "64x64", True)),
        ("placeholder_token", 5, "give text"),
        ("autocaption_prefix", 3, "give text of at most"),
        ("sample_prompts", "a\n" * 9, "give at most 8 prompts, one a line"),
    ],
)
def test_a_value_out_of_range_or_of_another_kind_gets_its_sentence(option, value, sentence):
    with pytest.raises(ValueError, match=f"{option.removeprefix('lora_')} is .*{sentence}"):
        train_config({option: value})


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_every_option_may_be_left_blank_also_in_the_file(blank, yaml_file):
    assert train_config(dict.fromkeys(OPTIONS, blank)) == TrainConfig()
    text = "train:\n  steps:\n  placeholder_token: ''\n"
    assert train_config({"steps": 5, "placeholder_token": "<zwx>"}, yaml_file(text)).steps == 5
    assert train_config({"seed": -1}) == train_config({"seed": "-1"}) == TrainConfig(seed=None)
    assert train_config({"sample_prompts": "a\n\n" * 8}).sample_prompts.count("a") == 8  # a blank line is no prompt


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(seed=0),
        TrainConfig(train_placeholder_token=True, placeholder_token=("<a>", "<b>"), resolution=(512, 768), learning_rate=1e-5),
        TrainConfig(seed=5, placeholder_token=("<zwx>",), quantize=True, quantize_te=True, report=False, optimizer="prodigy"),
        TrainConfig(seed=4294967295, sample_prompts="a\n\nb \u732b \U0001f600\n", sample_every=5, log_prompt_ids=True),
        TrainConfig(torch_compile=True, autocaption=True, autocaption_prefix="a photo of <>, ", default_caption="yes"),
        TrainConfig(token_gate=False, torch_compile=False, deterministic=True, placeholder_vectors=2, caption_dropout=0.0),
    ],
)
def test_a_configuration_can_be_written_as_yaml_and_given_again(config, yaml_file):
    path = yaml_file(config_yaml(config))
    assert train_config({}, path) == config
    others = {"steps": 3, "lora_rank": 7, "train_placeholder_token": not config.train_placeholder_token, "seed": None}
    assert train_config(others, path) == config
    assert set(read_sections(path, YAML_SECTIONS)) == set(vars(config))


# U+0085 is a line break of YAML, which comes back as a space or a line feed.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x85")


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(rate=st.floats(1e-6, 1e-2), strength=st.floats(0, 10), words=st.text(LETTERS, max_size=40))
def test_every_float_and_every_text_survives_the_yaml_exactly(rate, strength, words, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "exact.yaml"
    config = TrainConfig(
        learning_rate=rate,
        prior_preservation=strength,
        class_word=f"x{words.replace('>', '')}",
        default_caption=f"{words}x{words}",
    )
    path.write_bytes(config_yaml(config).encode())
    assert train_config({}, path) == config


def test_the_longest_texts_still_fit_into_the_yaml(yaml_file):
    longest = "x" + "\U0010ffff" * (MAX_TEXT_CHARACTERS - 1)
    config = TrainConfig(autocaption=True, default_caption=longest, class_word=longest, autocaption_prefix=longest)
    assert train_config({}, yaml_file(config_yaml(config))) == config

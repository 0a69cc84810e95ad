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

    def write(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
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


def test_a_token_named_beside_an_explicit_false_is_kept_for_the_log():
    config = train_config({"train_placeholder_token": False, "placeholder_token": "<zwx>"})
    assert (config.tokens, config.placeholder_token) == ((), ("<zwx>",))


def test_lora_rank_counts_where_it_is_given():
    assert train_config({"rank": 32, "lora_rank": None}).rank == 32
    assert train_config({"rank": 32, "lora_rank": 8}).rank == 8


@pytest.mark.parametrize(
    ("given", "sides"),
    [("512,768,1024", (512, 768, 1024)), ("64", (64,)), (" 128, 64 ,64", (64, 128)), (64, (64,)), ([96, "64"], (64, 96))],
)
def test_resolution_is_a_sorted_set_of_sides(given, sides):
    assert train_config({"resolution": given}).resolution == sides


def test_the_sections_of_the_yaml_file_hold_what_the_docs_say():
    assert YAML_SECTIONS["model"] == ("quantize", "quantize_te", "torch_compile", "deterministic")
    assert YAML_SECTIONS["debug"] == ("log_prompt_ids",)


def test_what_the_yaml_file_does_not_name_stays_as_the_inputs_say(yaml_file):
    config = train_config({"steps": 99, "quantize": True}, yaml_file("train:\n  rank: 4\nmodel:\n"))
    assert (config.steps, config.rank, config.quantize) == (99, 4, True)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n"])
def test_an_empty_yaml_file_changes_nothing(text, yaml_file):
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


def test_aliases_that_would_grow_without_bound_are_refused_at_once(yaml_file):
    levels = [f"{new}: &{new} {{<<: [{','.join(['*' + old] * 9)}]}}" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(ValueError, match="aliases .* are not read, write the value itself"):
        train_config({}, yaml_file("\n".join(["a: &a {k: 1}", *levels])))


def test_a_yaml_file_in_another_encoding_gets_its_sentence(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("train:\n  default_caption: caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="config is not a YAML file"):
        train_config({}, path)


def test_a_yaml_file_that_is_not_there_gets_its_sentence(tmp_path):
    with pytest.raises(ValueError, match="config"):
        train_config({}, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("steps", 0, "from 1 to 20000"),
        ("steps", 20001, "from 1 to 20000"),
        ("steps", 1.5, "whole number"),
        ("rank", 0, "from 1 to 256"),
        ("lora_rank", 257, "from 1 to 256"),
        ("learning_rate", 0, "from 1e-06 to 0.01"),
        ("learning_rate", "fast", "give a number"),
        ("batch_size", 3, "choose one of 1, 2, 4"),
        ("resolution", "63", "give whole numbers from 64 to 2048, separated by commas"),
        ("resolution", "2049", "from 64 to 2048"),
        ("resolution", "64,", "separated by commas"),
        ("resolution", [], "separated by commas"),
        ("resolution", 64.5, "separated by commas"),
        ("resolution", "64x64", "separated by commas"),
        ("resolution", True, "separated by commas"),
        ("caption_dropout", 0.91, r"from 0\.0 to 0\.9"),
        ("train_placeholder_token", "true", "give true or false"),
        ("placeholder_token", 5, "give text"),
        ("placeholder_init_std", -1e-5, r"from 0\.0 to 1\.0"),
        ("placeholder_learning_rate", 2, r"from 0\.0 to 1\.0"),
        ("placeholder_warmup_fraction", 0.95, r"from 0\.0 to 0\.9"),
        ("prior_preservation", -1, r"from 0\.0 to 10\.0"),
        ("prior_preservation_interval", 0, "from 1 to 100"),
        ("optimizer", "sgd", "choose one of adamw, adamw8bit, adam8bit, prodigy"),
        ("quantize", "no", "give true or false"),
        ("quantize_te", 0, "give true or false"),
        ("seed", -2, "from -1 to 4294967295"),
        ("seed", 2**32, "from -1 to 4294967295"),
        ("report", "yes", "give true or false"),
        ("sample_every", -1, "from 0 to 20000"),
        ("sample_prompts", "a\n" * 9, "give at most 8 prompts, one a line"),
    ],
)
def test_every_value_out_of_range_or_of_another_kind_gets_its_sentence(option, value, sentence):
    with pytest.raises(ValueError, match=f"{option.removeprefix('lora_')} is .*{sentence}"):
        train_config({option: value})


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_every_option_may_be_left_blank_also_in_the_file(blank, yaml_file):
    assert train_config(dict.fromkeys(OPTIONS, blank)) == TrainConfig()
    text = "train:\n  steps:\n  placeholder_token: ''\n"
    assert train_config({"steps": 5, "placeholder_token": "<zwx>"}, yaml_file(text)).steps == 5
    assert train_config({"seed": -1}) == train_config({"seed": "-1"}) == TrainConfig(seed=None)


def test_a_quantized_text_encoder_and_a_token_are_refused_together():
    with pytest.raises(ValueError, match="quantize_te cannot be combined with a placeholder token"):
        train_config({"quantize_te": True, "placeholder_token": "<zwx>"})
    assert train_config({"quantize_te": True, "train_placeholder_token": False, "placeholder_token": "<zwx>"}).quantize_te


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample_every": 4}, "sample_every is 4: with 1000 steps give at least 5, or 0 for no samples"),
        ({"sample_every": 100, "report": False}, "make images for the report, which is off: set report to true"),
        ({"sample_prompts": "a cat", "report": False}, "make images for the report, which is off: set report to true"),
    ],
)
def test_samples_that_could_not_be_kept_get_their_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_config(options)


def test_lines_that_are_blank_are_no_prompts():
    assert train_config({"sample_prompts": "a\n\n" * 8}).sample_prompts.count("a") == 8


@pytest.mark.parametrize("name", ["autocaption_prefix", "autocaption_suffix"])
def test_a_prefix_or_suffix_of_autocaption_needs_autocaption(name):
    with pytest.raises(ValueError, match=f"{name} is put around the captions of autocaption, which is off: set autocaption"):
        train_config({name: "a photo of"})
    assert getattr(train_config({name: "a photo of", "autocaption": True}), name) == "a photo of"
    assert train_config({name: " "}) == train_config({name: None}) == TrainConfig()
    with pytest.raises(ValueError, match=f"{name} is 3: give text of at most"):
        train_config({name: 3, "autocaption": True})


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


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x85")


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(rate=st.floats(1e-6, 1e-2), strength=st.floats(0, 10), words=st.text(CHARACTERS, max_size=40))
def test_every_float_and_every_text_survives_the_yaml_exactly(rate, strength, words, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "exact.yaml"
    config = TrainConfig(
        learning_rate=rate, prior_preservation=strength, class_word=f"x{words}", default_caption=f"{words}x{words}"
    )
    path.write_bytes(config_yaml(config).encode())
    assert train_config({}, path) == config


def test_the_longest_texts_still_fit_into_the_yaml(yaml_file):
    longest = "x" + "\U0010ffff" * (MAX_TEXT_CHARACTERS - 1)
    config = TrainConfig(autocaption=True, default_caption=longest, class_word=longest, autocaption_prefix=longest)
    assert train_config({}, yaml_file(config_yaml(config))) == config

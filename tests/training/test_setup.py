"""What a training is given before its first step, where other tests do not look: the prompts that preservation keeps."""

import pytest

from placeholder.config import TrainConfig
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training.context import Context
from placeholder.training.setup import prepare
from tests.conftest import SHORT


def prepared(dataset, base, **options):
    log: list[str] = []
    config = TrainConfig(**SHORT, train_placeholder_token=True, placeholder_token=("<zwx>",), **options)
    return prepare(dataset, Context(config, base, log.append)), log


@pytest.mark.parametrize(
    ("class_word", "prompts"),
    [
        ("", ["a photo of", "in a garden", "A photo of a person named"]),
        ("dog", ["a photo of dog", "dog in a garden", "A photo of a person named dog"]),
    ],
)
def test_preservation_keeps_the_captions_without_their_token_and_encodes_them_once(
    class_word, prompts, dataset, base, tokenizer
):
    training, log = prepared(dataset, base, prior_preservation=1.0, class_word=class_word)
    kept = [tuple(prompt_ids(tokenizer, training.tokens, text) for text in (prompt, " ")) for prompt in prompts]
    assert [example.preserved for example in training.state.sampler.examples] == kept
    assert not any(training.prompt_embeds([ids]).requires_grad for pair in kept for ids in pair)
    assert f"Prior preservation: prompts such as '{prompts[0]}' keep what the base model generates for them" in log


def test_without_preservation_there_is_nothing_to_keep(dataset, base):
    training, log = prepared(dataset, base, prior_preservation=0.0)
    assert [example.preserved for example in training.state.sampler.examples] == [(), (), ()]
    assert not any(line.startswith("Prior preservation") for line in log)

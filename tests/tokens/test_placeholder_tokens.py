"""Placeholder tokens: their ids, where these stand in a prompt, and their learned rows."""

import copy
import random

import pytest
import torch
from torch import nn
from transformers import AddedToken

from placeholder.config import TrainConfig
from placeholder.model.base import QWEN_IMAGE
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, fresh_tokens, initial_embeddings

FIRST_ID = 151665


def tokens_of(*names: str, vectors: int = 1, width: int = 4) -> PlaceholderTokens:
    generator = torch.Generator().manual_seed(0)
    return PlaceholderTokens(FIRST_ID, {name: torch.randn(vectors, width, generator=generator) for name in names}, width)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of <zwx>", [64, 6548, 315, 220, 151665]),
        ("a portrait of <zwx> smiling", [64, 33033, 315, 220, 151665, 36063]),
        ("<zwx> in a garden", [151665, 304, 264, 13551]),
        ("beautiful <zwx> at sunset", [86944, 220, 151665, 518, 42984]),
        ("zwx", [89, 20984]),
        ("TOK", [51, 3925]),
        ("<zwx><zwx>", [151665, 151665]),
        ("", []),
    ],
)
def test_prompts_have_the_ids_of_the_real_vocabulary(prompt, ids, tokenizer):
    assert tokens_of("<zwx>").tokenize(tokenizer, prompt) == ids


PIECES = [
    *("<zwx>", "<qrs>", "<zwx>", "<zw", "zwx>", "<", ">", "<<zwx>>", "<ZWX>", "< zwx >", "<zwx"),
    *("a photo of", "cat", "Chelsea", "portrait's", "don't", "x", "TOK", "123", "3.14", "!?", "...", "{}", "[trigger]"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000"),
    *("é", "e\u0301", "\u0338", "写真", "한국", "😀", "👩‍👩‍👧", "ß", "İ", "ﬁ", "\ufeff", "𝒳"),
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "<|im_", "start|>"),
]


def test_splicing_equals_a_truly_registered_token_on_random_strings(tokenizer):
    registered = copy.deepcopy(tokenizer)
    added = [AddedToken(token, special=True, normalized=False) for token in ("<zwx>", "<qrs>")]
    assert registered.add_tokens(added, special_tokens=True) == 2
    tokens = tokens_of("<zwx>", "<qrs>")
    prefix, suffix = QWEN_IMAGE.prompt_prefix, QWEN_IMAGE.prompt_suffix
    draw = random.Random(0)
    prompts = ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(1000)]
    for prompt in prompts:
        assert tokens.tokenize(tokenizer, prompt) == registered(prompt).input_ids, prompt
        assert tokens.tokenize(tokenizer, prompt, prefix, suffix) == registered(prefix + prompt + suffix).input_ids, prompt
    assert sum("<zwx>" in prompt for prompt in prompts) > 270
    assert sum("<zwx><qrs>" in prompt or "<qrs><zwx>" in prompt for prompt in prompts) > 7
    assert len(tokenizer) == FIRST_ID


def test_a_token_in_the_template_is_not_a_placeholder(tokenizer):
    assert tokens_of("<zwx>").tokenize(tokenizer, "a", prefix="<zwx> ") == tokenizer("<zwx> a").input_ids


def test_the_learned_rows_stand_where_the_new_ids_stand_and_nowhere_else():
    vocabulary = nn.Embedding(10, 4)
    tokens = PlaceholderTokens(8, {"<a>": torch.full((2, 4), 5.0), "<b>": torch.full((1, 4), 7.0)}, 4)
    # Id 8 and 9 have a row in the vocabulary, as ids in a padded vocabulary do, id 10 has none.
    found = tokens.embed(vocabulary, torch.tensor([[0, 8, 7, 9], [10, 3, 10, 1]]))
    expected = vocabulary(torch.tensor([[0, 0, 7, 0], [0, 3, 0, 1]])).detach().clone()
    expected[0, 1] = expected[0, 3] = 5.0
    expected[1, 0] = expected[1, 2] = 7.0
    assert torch.equal(found, expected)


def test_gradients_reach_the_rows_that_were_named_and_no_others():
    vocabulary = nn.Embedding(8, 4).requires_grad_(False)
    tokens = tokens_of("<a>", "<b>", "<c>")
    ids = torch.tensor([[0, FIRST_ID + 1, 3, FIRST_ID + 1]])
    (tokens.embed(vocabulary, ids) * torch.arange(1.0, 5.0).view(1, 4, 1)).sum().backward()
    assert torch.equal(tokens.rows.grad, torch.tensor([[0.0], [6.0], [0.0]]).expand(3, 4))
    assert vocabulary.weight.grad is None


def test_embeddings_come_back_by_token_as_copies():
    given = {"<a>": torch.randn(2, 4), "<b>": torch.randn(1, 4)}
    tokens = PlaceholderTokens(8, given, 4)
    found = tokens.embeddings()
    assert list(found) == ["<a>", "<b>"]
    assert all(torch.equal(found[token], rows) for token, rows in given.items())
    with torch.no_grad():
        tokens.rows.zero_()
    assert all(torch.equal(found[token], rows) for token, rows in given.items())


@pytest.mark.parametrize("shape", [(1, 5), (4,), (1, 1, 4)])
def test_rows_of_another_base_models_width_get_their_sentence(shape):
    with pytest.raises(ValueError, match=r"the embedding of <a> has shape .*: this base model takes \(k, 4\)"):
        PlaceholderTokens(8, {"<a>": torch.zeros(shape)}, 4)


def test_only_ids_of_placeholders_count_as_contained():
    tokens = tokens_of("<a>", vectors=2)
    assert tokens.contains([5, FIRST_ID])
    assert tokens.contains([FIRST_ID + 1])
    assert not tokens.contains([5, FIRST_ID - 1, FIRST_ID + 2])
    assert not PlaceholderTokens(FIRST_ID, {}, 4).contains([FIRST_ID])


def test_fresh_rows_are_normal_of_the_given_size_and_zero_is_exactly_zero():
    def fresh(std: float, seed: int = 0) -> torch.Tensor:
        return initial_embeddings(("<a>", "<b>"), 4096, std, torch.Generator().manual_seed(seed))["<b>"]

    assert fresh(1e-5).shape == (1, 4096)
    assert fresh(1e-5).std().item() == pytest.approx(1e-5, rel=0.05)
    assert abs(fresh(1e-5).mean().item()) < 1e-6
    assert torch.equal(fresh(1e-5), fresh(1e-5))
    assert not torch.equal(fresh(1e-5), fresh(1e-5, seed=1))
    assert torch.equal(fresh(0.0), torch.zeros(1, 4096))


def test_a_token_that_is_a_regular_expression_is_taken_literally(tokenizer):
    tokens = tokens_of("<.*>")
    assert tokens.tokenize(tokenizer, "a <cat>") == tokenizer("a <cat>").input_ids
    assert tokens.first_id in tokens.tokenize(tokenizer, "a <.*>")


def test_a_trainings_fresh_tokens_are_logged_with_their_ids(tokenizer):
    def logged(**options) -> list[str]:
        log: list[str] = []
        config = TrainConfig(train_placeholder_token=True, **options)
        tokens = fresh_tokens(config, 4, tokenizer, torch.Generator().manual_seed(0), log.append)
        assert tokens.first_id == len(tokenizer) == FIRST_ID
        return log

    assert logged(placeholder_token=("<zwx>",)) == [
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Gradient mask active: only token 151665 receives updates",
    ]
    assert logged(placeholder_token=("<zwx>", "<qrs>"), placeholder_vectors=2) == [
        "Placeholder token '<zwx>' registered with ID: 151665, 151666",
        "Placeholder token '<qrs>' registered with ID: 151667, 151668",
        "Gradient mask active: only tokens 151665, 151666, 151667, 151668 receive updates",
    ]
    assert logged() == []

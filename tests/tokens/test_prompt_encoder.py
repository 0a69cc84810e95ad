"""Prompts: their ids, that they are encoded as the pipeline does it, and once where once is enough."""

import pytest
import torch

from placeholder.model.base import QWEN_IMAGE
from placeholder.model.loading import load_text_encoder
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import PromptEncoder, encode_prompts, prompt_ids, tokenized
from tests.support.stock import stock_pipeline

NO_TOKENS = PlaceholderTokens(151665, {}, 32)
LONG = "a very long prompt about nothing in particular, " * 100


@pytest.fixture(scope="module")
def stock(base):
    """The whole base model in a stock pipeline."""
    return stock_pipeline(base.source)


@pytest.mark.parametrize(
    "prompt",
    ["a photo of a cat", " ", "zwx and TOK", "{braces} and <|im_end|>", "写真 😀\n\ntwo lines", LONG],
    ids=lambda p: p[:20],
)
def test_prompt_embeddings_equal_the_pipelines(prompt, stock, text_encoder, tokenizer):
    with torch.no_grad():
        expected, mask = stock.encode_prompt(prompt, max_sequence_length=512)
        found = encode_prompts(text_encoder, NO_TOKENS, torch.tensor([prompt_ids(tokenizer, NO_TOKENS, prompt)]))
    assert mask is None
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_with_the_token_has_the_embeddings_of_a_row_in_the_matrix(base, text_encoder, tokenizer):
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    tokens = PlaceholderTokens(151665, {"<zwx>": row}, 32)
    ids = torch.tensor([prompt_ids(tokenizer, tokens, "a photo of <zwx> in a garden")])
    whole = load_text_encoder(base)
    with torch.no_grad():
        whole.embed_tokens.weight[151665] = row[0]
        expected = whole(input_ids=ids).last_hidden_state[:, 34:]
        found = encode_prompts(text_encoder, tokens, ids)
        without = encode_prompts(text_encoder, PlaceholderTokens(151665, {"<zwx>": -row}, 32), ids)
    assert torch.equal(found, expected)
    assert not torch.equal(found, without)


def test_the_template_is_the_pipelines_and_34_tokens_stand_before_the_prompt(stock, tokenizer):
    prefix, suffix, dropped = QWEN_IMAGE.prompt_prefix, QWEN_IMAGE.prompt_suffix, QWEN_IMAGE.dropped_tokens
    assert prefix + "{}" + suffix == stock.prompt_template_encode
    assert len(tokenizer(prefix).input_ids) == dropped == 34
    assert prompt_ids(tokenizer, NO_TOKENS, "") == prompt_ids(tokenizer, NO_TOKENS, " ")


@pytest.mark.parametrize(
    ("prompt", "used", "left_out", "lost"),
    [
        ("a photo of <zwx>", 5, 0, []),
        (" a" * 512, 512, 0, []),
        (" a" * 513, 512, 1, []),
        (" a" * 511 + " <zwx>", 512, 1, ["<zwx>"]),  # the space before the token is the last that fits
        (" a" * 510 + " <zwx>", 512, 0, []),
        ("<zwx>" + " a" * 600 + "<zwx>", 512, 90, []),
        (" a" * 511 + "<qrs>", 512, 1, ["<qrs>"]),  # its first vector fits, its second does not
        (LONG + "<zwx> and <qrs>", 512, 394, ["<zwx>", "<qrs>"]),
    ],
    ids=lambda p: p[-20:] if isinstance(p, str) else None,
)
def test_a_prompt_says_what_is_left_out_of_it_and_which_tokens_are(prompt, used, left_out, lost, tokenizer):
    tokens = PlaceholderTokens(151665, {"<zwx>": torch.zeros(1, 32), "<qrs>": torch.zeros(2, 32)}, 32)
    found = tokenized(tokenizer, tokens, prompt)
    assert (len(found.used), len(found.left_out), found.lost(tokens)) == (used, left_out, lost)
    assert found.ids[34 : 34 + used] == found.used
    assert tokens.named(found.ids).isdisjoint(lost)
    among = f", among them {', '.join(lost)}" if lost else ""
    words = f"{left_out} of {used + left_out} tokens are left out{among} (a prompt is cut after 512)" if left_out else ""
    assert found.cut(tokens) == words


def test_only_prompts_without_a_token_are_cached_and_the_others_follow_the_row(text_encoder, tokenizer):
    tokens = PlaceholderTokens(151665, {"<zwx>": torch.full((1, 32), 0.01)}, 32)
    prompt_embeds = PromptEncoder(text_encoder, tokens)
    plain, named = (prompt_ids(tokenizer, tokens, prompt) for prompt in ("a photo of it", "a photo of <zwx>"))
    assert prompt_embeds.cache([plain, named, plain]) == 1
    before = prompt_embeds([named])
    with torch.no_grad():
        tokens.rows.neg_()
    assert not torch.equal(prompt_embeds([named]), before)
    assert prompt_embeds([named]).requires_grad
    prompt_embeds.release()
    assert not prompt_embeds([plain]).requires_grad
    expected = encode_prompts(text_encoder, NO_TOKENS, torch.tensor([plain, plain])).detach()
    torch.testing.assert_close(prompt_embeds([plain, plain]), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_cached_and_one_uncached_prompt_gives_each_its_own(text_encoder, tokenizer):
    tokens = PlaceholderTokens(151665, {"<zwx>": torch.full((1, 32), 0.01)}, 32)
    prompt_embeds = PromptEncoder(text_encoder, tokens)
    prompts = [prompt_ids(tokenizer, tokens, prompt) for prompt in ("a photo of <zwx>", "a photo of  x")]
    assert len(prompts[0]) == len(prompts[1])
    prompt_embeds.cache(prompts)
    with torch.no_grad():
        both, apart = prompt_embeds(prompts), torch.cat([prompt_embeds([ids]) for ids in prompts])
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_prompts_of_one_step_have_the_gradient_of_each_alone(text_encoder, tokenizer):
    tokens = PlaceholderTokens(151665, {"<zwx>": torch.full((1, 32), 0.01)}, 32)
    prompts = [prompt_ids(tokenizer, tokens, f"a {kind} of <zwx> at sunset") for kind in ("photo", "drawing")]
    prompt_embeds = PromptEncoder(text_encoder, tokens)
    together = torch.autograd.grad(prompt_embeds(prompts).square().sum(), tokens.rows)[0]
    alone = [torch.autograd.grad(prompt_embeds([ids]).square().sum(), tokens.rows)[0] for ids in prompts]
    torch.testing.assert_close(together, sum(alone), rtol=1e-4, atol=1e-5)
    assert together.abs().max() > 1e-3

"""Placeholder tokens and the vocabulary: which are refused, which warned about, and the ids of an archive's tokens."""

import pytest
import torch

from placeholder.tokens.vocabulary import archive_tokens, check_tokens


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("",), "'' is empty or holds white space: give one word such as <zwx>"),
        (("a b",), "'a b' is empty or holds white space"),
        (("<a\u00a0b>",), "is empty or holds white space"),
        (("<a\tb>",), "is empty or holds white space"),
        (("<a\u200bb>",), "is empty or holds white space"),
        (("<a\x1b[31m>",), r"'<a\\x1b\[31m>' is empty or holds white space"),
        (("<\ud800>",), r"'<\\ud800>' is empty or holds white space"),
        (tuple(f"<q{number}>" for number in range(65)), "placeholder_token names 65 tokens: give at most 64"),
        (("cat",), "'cat' is already a token of the vocabulary, so it has a prior: give a new one such as <zwx>"),
        (("TOKEN",), "'TOKEN' is already a token"),
        (("TOK",), "'TOK' is already a token"),  # " TOK" is one
        (("<>",), "'<>' is already a token"),
        (("<|im_end|>",), r"'<\|im_end\|>' is already a token"),
        (("im_end",), r"'im_end' overlaps with '<\|im_end\|>': give tokens that do not contain each other"),
        (("<zwx>", "<zwx>"), "'<zwx>' overlaps with '<zwx>'"),
        (("<zwx>", "a<zwx>b"), "'<zwx>' overlaps with 'a<zwx>b'"),
        (("<zwx>", "zwx"), "'<zwx>' overlaps with 'zwx'"),
        (("<" + "x" * 63 + ">",), "has 65 bytes in UTF-8: give at most 64"),
    ],
)
def test_a_token_that_cannot_be_new_gets_its_sentence(names, sentence, tokenizer):
    with pytest.raises(ValueError, match=sentence):
        check_tokens(names, tokenizer)


@pytest.mark.parametrize("names", [(), ("<zwx>",), ("<zwx>", "<qrs>"), ("<Zwx-2>",), ("<ねこ>",), ("<" + "x" * 62 + ">",)])
def test_bracketed_new_words_are_accepted_without_a_warning(names, tokenizer):
    assert check_tokens(names, tokenizer) == []


def test_an_unbracketed_token_that_is_split_is_warned_about(tokenizer):
    (warning,) = check_tokens(("zwx",), tokenizer)
    assert "placeholder_token 'zwx' is split into [89, 20984] by the base tokenizer and is not bracketed" in warning
    assert "write '<zwx>'" in warning


def test_an_archives_tokens_have_the_ids_that_they_were_trained_with(tokenizer):
    rows = {"<zwx>": torch.ones(2, 4), "<qrs>": torch.zeros(1, 4)}
    ids = {"<zwx>": [151665, 151666], "<qrs>": [151667]}
    tokens = archive_tokens(rows, ids, tokenizer, 4)
    assert tokens.ids == ids
    assert tokens.embeddings().keys() == rows.keys()
    for wrong in ({"<zwx>": [151665], "<qrs>": [151667]}, {"<zwx>": [151665, 151666]}, {}):
        with pytest.raises(
            ValueError, match="the token ids of the archive are .*, here they are .*: it was trained on another"
        ):
            archive_tokens(rows, wrong, tokenizer, 4)
    with pytest.raises(ValueError, match="overlaps with"):
        archive_tokens({"<zwx>": rows["<zwx>"], "zwx": rows["<qrs>"]}, ids, tokenizer, 4)

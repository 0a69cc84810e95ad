"""The experiment with two tokens: its dataset, its measures, and that its page is up to date."""

import json
from functools import partial
from pathlib import Path

import pytest

from placeholder.data.captions import preserved_prompts, trained_captions
from placeholder.data.dataset import read_dataset
from standin.subject import SEEN_BACKGROUNDS
from study.tables import CELL, sheet
from study.two_measures import DRAWN, both_measures, halves, one_named_measures, rendered
from study.two_sheet import COLUMNS, strip, tables
from study.two_subjects import KINDS, ORDERS, ImageSpec, both, nouns, taught, write_dataset
from study.two_tokens import ARMS, TOKENS, TRIGGERS

DOCS = Path(__file__).parents[2] / "docs"
NAMED = nouns(TOKENS)
generate = partial(rendered, count=2)


def photos_of(arm, folder):
    photos, _ = read_dataset(write_dataset(folder / "data.zip", taught(arm.named, arm.together)), (64,))
    return photos


def test_the_package_reads_captions_that_name_one_token_or_both(tmp_path):
    arm = ARMS["two tokens"]
    config = arm.config(seed=0)
    captions = [caption.text for caption in trained_captions(photos_of(arm, tmp_path), config, log=lambda line: None)]
    named = [tuple(token for token in TOKENS if token in caption) for caption in captions]
    assert config.tokens == TOKENS
    assert [named.count(tokens) for tokens in (TOKENS[:1], TOKENS[1:], TOKENS)] == [12, 12, 12]
    firsts = [caption.index(TOKENS[0]) < caption.index(TOKENS[1]) for caption in captions if all(t in caption for t in TOKENS)]
    assert sum(firsts) == 6
    plain = preserved_prompts(captions, ARMS["two tokens, no gate"].config(seed=0), log=lambda line: None)
    assert plain[-1][0] == "a photo of a small face and a small house on a pink background"


def test_arms_differ_in_what_they_say(tmp_path):
    without = [photo.caption for photo in photos_of(ARMS["two tokens, no picture of both"], tmp_path)]
    assert len(without) == 24
    assert not any(all(token in caption for token in TOKENS) for caption in without)
    words = ARMS["trigger words TOK and sks"]
    assert words.config(0).tokens == ()
    assert all(any(word in photo.caption for word in TRIGGERS) for photo in photos_of(words, tmp_path))
    assert ARMS["two tokens, no gate"].config(0).preserves and not ARMS["two tokens"].config(0).preserves


@pytest.mark.parametrize("order", ORDERS)
def test_each_half_is_measured_for_the_subject_that_belongs_there(order):
    for image in generate(both(NAMED, order, "blue")):
        own, other = halves(image, "blue", order)
        assert min(own) > 0.8 and max(other) < 0.2, (own, other)
        own, other = halves(image, "blue", order[::-1])  # as if they had been asked for the other way round
        assert max(own) < 0.2 and min(other) > 0.8, (own, other)


def test_pictures_of_both_pass_and_swapped_or_missing_subjects_fail():
    found = both_measures(generate, NAMED, "unseen")
    assert found["worse"] > 0.8 and found["both_drawn"] == 1.0 and found["other"] < 0.2, found

    def swapped(spec: ImageSpec):
        return generate(ImageSpec(spec.caption, spec.kinds[::-1], spec.background))

    found = both_measures(swapped, NAMED, "unseen")
    assert found["worse"] < DRAWN < found["other"] and found["both_drawn"] == 0.0, found

    def first_twice(spec: ImageSpec):
        return generate(ImageSpec(spec.caption, (KINDS[0], KINDS[0]), spec.background))

    found = both_measures(first_twice, NAMED, "unseen")
    assert found["first"] > 0.8 and found["second"] < 0.3 and found["both_drawn"] == 0.0, found


def test_a_plain_class_word_beside_a_subject_is_not_the_other_subject():
    assert one_named_measures(generate, NAMED, 0)["leak"] < 0.3

    def leaking(spec: ImageSpec):
        return generate(ImageSpec(spec.caption, KINDS, spec.background))

    assert one_named_measures(leaking, NAMED, 0)["leak"] > 0.8


def test_the_sheet_has_a_picture_for_each_column():
    specs = strip(generate, NAMED)
    assert len(specs) == len(COLUMNS)
    assert sheet(COLUMNS, {"one": specs, "two": specs}).height == sheet(COLUMNS, {"one": specs}).height + CELL


def test_the_data_set_never_shows_an_unseen_background():
    assert {spec.background for spec in taught(NAMED)} == set(SEEN_BACKGROUNDS)


def test_the_page_shows_the_figures_of_the_last_run():
    results = json.loads((DOCS / "two-tokens.json").read_text())["results"]
    assert set(ARMS) < set(results)
    assert all(len(results[name]) >= 3 for name in ARMS)
    page = (DOCS / "study.md").read_text()
    assert all(table in page for table in tables(results).split("\n\n"))

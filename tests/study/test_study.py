"""The study's subjects, statistics and file, on images that the world renders and on figures that are made up for a test."""

import json

import numpy as np
import pytest

from standin.world import Scene, render
from study.arms import ARMS, OURS, REFERENCE, TOKEN
from study.measures import ALWAYS, GATED
from study.run import Results, tasks
from study.subjects import SUBJECTS, Context
from study.tables import comparison, grid, interval, measure, table


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_scores_high_on_itself_and_low_on_what_the_world_holds(name):
    subject = SUBJECTS[name]
    for context in subject.seen + subject.unseen:
        own = subject.fidelity(subject.image(context, seed=77), context)
        things = (context.thing,) if context.thing else ()
        assert own > 0.85 and subject.fidelity(render(Scene(things, context.background, 77)), context) < 0.1, own


def test_captions_name_the_trigger_and_the_class_word_and_without_it_the_class():
    red = SUBJECTS["style"].seen[0]
    assert SUBJECTS["object"].prompt(TOKEN, Context("blue")) == "a photo of a <zwx> house on a blue background"
    assert SUBJECTS["face"].prompt("", Context("blue")) == "a photo of a face on a blue background"
    assert SUBJECTS["style"].prompt(TOKEN, red) == "a <zwx> photo of a red circle on a blue background"


def test_an_interval_is_wider_where_subjects_differ_than_where_all_values_are_the_same():
    assert interval(np.full((3, 5), 0.4)) == pytest.approx((0.4, 0.4))
    low, high = interval(np.array([[0.1] * 5, [0.5] * 5, [0.9] * 5]))
    assert low == pytest.approx(0.1, abs=0.05) and high == pytest.approx(0.9, abs=0.05)
    low, high = interval(np.array([[0.3, 0.4, 0.5, 0.6, 0.7]] * 3))
    assert 0.3 < low < 0.5 < high < 0.7


def made_up(arm: str, subject: str, seed: int, leakage: float) -> dict:
    drawn = {"prior_leakage": leakage, "prior_leakage_by_step": {"100": leakage, "200": 3 * leakage}, "neighbor_class": 0.3}
    if subject == "style":
        drawn = {"prior_leakage": None, "prior_leakage_by_step": {"100": None, "200": None}}
    return {"arm": arm, "subject": subject, "seed": seed, "drawn": {ALWAYS: drawn, GATED: drawn}}


def test_tables_pair_runs_by_subject_and_seed_and_leave_out_what_a_style_lacks():
    runs = [
        made_up(arm, subject, seed, leakage + 0.1 * seed)
        for arm, leakage in ((REFERENCE, 0.3), (OURS, 0.0))
        for subject in SUBJECTS
        for seed in (0, 1)
    ]
    assert grid(runs, OURS, measure(GATED, "neighbor_class")).shape == (2, 2)
    assert grid(runs, REFERENCE, measure(ALWAYS, "prior_leakage_mean")) == pytest.approx(np.array([[0.6, 0.8]] * 2))
    assert "| end | 0.05 (0.00 to 0.10) | 0.35 | -0.30 (-0.30 to -0.30) | 0.35 | -0.30 (-0.30 to -0.30) |" in comparison(runs)
    assert table(runs, {REFERENCE: 1.0, OURS: 1.1}).splitlines()[-1].startswith(f"| {OURS} | gated | 1.10 | ")


def test_a_study_goes_on_from_its_file_and_begins_anew_with_another_base_model_or_classifier(tmp_path):
    path, flops = tmp_path / "study.json", dict.fromkeys(ARMS, 1.0) | {"token, preservation": 1.6}
    planned = tasks(["TOK", "token, preservation"], 1, "base", flops)
    assert [task.equal_flops for task in planned[:2]] == [300, 188] and len(planned) == 6
    assert len(tasks(list(ARMS), 1, "base", flops)) == 3 * 7 + 3
    made_with = {"base": "digest", "judge": "another"}
    first = Results(path, made_with)
    first.flops = flops
    first.add(planned[0], {"drawn": {}})
    assert [Results(path, made_with).lacks(task) for task in planned[:2]] == [False, True]
    assert all(Results(path, made_with | {name: "new"}).lacks(planned[0]) for name in made_with)
    assert json.loads(path.read_text())["flops"] == flops

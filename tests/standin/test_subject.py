"""Real trainings on the small base model: the study's main claims on fewer images and steps, and that breaking a part shows."""

from dataclasses import dataclass, replace

import pytest

from placeholder.lora.adapter import ADAPTER, without_lora
from placeholder.model.base import BaseModel
from placeholder.training.context import Training
from placeholder.training.diagnostics import diagnose, rows_as
from study import measures
from study.arms import ARMS, TOKEN, on_the_small_base, steps_of
from study.measures import ALWAYS, GATED, LOW_SCALE, Images, Measures, difference
from study.subjects import SUBJECTS

STEPS, IMAGES, CONTEXTS = 150, 2, SUBJECTS["object"].seen[:2] + SUBJECTS["object"].unseen[:1]
MIN_FIDELITY, MIN_ROW_SHARE, MIN_DIFFERENCE = 0.25, 0.1, 0.01


@dataclass(frozen=True)
class Trained:
    """A training of STEPS steps, and its measures."""

    training: Training
    measures: Measures

    def images(self) -> Images:
        return self.measures.sampler.sample_all([SUBJECTS["object"].prompt(TOKEN, context) for context in CONTEXTS], IMAGES)

    def fidelity(self) -> float:
        return self.measures.fidelity(CONTEXTS)[0]

    def prior_leakage(self) -> float:
        self.training.state.transformer.set_adapters(ADAPTER, weights=LOW_SCALE)
        found = self.measures.prior_leakage()
        self.training.state.transformer.set_adapters(ADAPTER, weights=1.0)
        return found


def trained(name: str, base: BaseModel, steps: int = STEPS) -> Trained:
    training, sampler = on_the_small_base(ARMS[name], SUBJECTS["object"], 0, base)
    for _ in steps_of(ARMS[name], training, replace(ARMS[name].config(seed=0), steps=steps)):
        pass
    return Trained(training, Measures(ARMS[name], SUBJECTS["object"], sampler))


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(measures, "SAMPLES", IMAGES)


@pytest.fixture(scope="module")
def token(small_base) -> Trained:
    return trained("token, preservation", small_base)


def test_the_subject_is_learned_without_the_old_meaning_of_a_trigger_word(token, small_base):
    """The old meaning is measured at half the LoRA's scale: at the full one enough steps overrule the trigger word."""
    word = trained("TOK", small_base, steps=40)
    assert token.fidelity() > MIN_FIDELITY
    assert word.prior_leakage() > 0.5 and token.prior_leakage() < 0.02


def test_with_the_gate_every_other_prompt_is_the_base_models(token, monkeypatch):
    monkeypatch.setattr(token.measures, "class_contexts", token.measures.class_contexts[:1])
    monkeypatch.setattr(measures, "UNRELATED", measures.UNRELATED[:1])
    with without_lora(token.training.state.transformer):
        before = token.measures.unnamed()
    changes = {}
    for mode in (ALWAYS, GATED):
        token.measures.draw_as(mode)
        changes[mode] = [difference(*pair) for pair in zip(token.measures.unnamed(), before, strict=True)]
    assert changes[GATED] == [0.0, 0.0] and min(changes[ALWAYS]) > 0.001, changes
    assert token.fidelity() > MIN_FIDELITY
    token.measures.draw_as(ALWAYS)


def test_a_row_that_is_lost_shows(token):
    """The LoRA and the class word bring the subject back without it, in other images."""
    images = token.images()
    with rows_as(token.training.tokens, token.training.initial_rows):
        assert difference(images, token.images()) > MIN_DIFFERENCE


def test_a_lora_that_is_not_applied_fails(token):
    with without_lora(token.training.state.transformer):
        assert token.fidelity() < MIN_FIDELITY


def test_a_frozen_row_fails(token, small_base):
    """Its images would pass, as the study finds: a near-zero row is a direction of its own. What fails is the row's share."""
    frozen = trained("token, embedding frozen", small_base, steps=8)
    assert diagnose(frozen.training).row_share == 0.0 < MIN_ROW_SHARE < diagnose(token.training).row_share

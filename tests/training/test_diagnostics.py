"""What a training says of its token: whether it is used, and what it is near to."""

from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS
from placeholder.lora.adapter import without_lora
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.training.context import Context
from placeholder.training.diagnostics import Diagnostics, diagnose, nearest_tokens, rows_as
from placeholder.training.loop import Schedule, train_steps
from placeholder.training.setup import prepare
from tests.conftest import SHORT

FOUND = Diagnostics(
    1.0, loss_row_reset=1.5, loss_lora_off=1.6, loss_base=2.0, nearest_tokens={"<zwx>": [["cat", 0.5]]}, unchanged=[]
)


@pytest.fixture(scope="module")
def training(dataset, base):
    """A short training with a token, before its first step."""
    config = TrainConfig(**SHORT, train_placeholder_token=True, placeholder_token=("<zwx>",), prior_preservation=0.0)
    return prepare(dataset, Context(config, base, log=lambda line: None))


def test_the_four_losses_are_those_of_the_trained_and_the_untrained_parts(training):
    before = diagnose(training)
    assert before.loss == before.loss_row_reset == before.loss_lora_off == before.loss_base
    assert before.unchanged == ["<zwx>"]
    list(train_steps(training.state, Schedule(SHORT["steps"]), SINGLE_PROCESS))
    after = diagnose(training)
    assert after.loss_base == before.loss_base
    assert len({after.loss, after.loss_row_reset, after.loss_lora_off, after.loss_base}) == 4
    assert after.loss < after.loss_base
    assert after.unchanged == []
    with without_lora(training.state.transformer), rows_as(training.tokens, training.initial_rows):
        assert diagnose(training).loss == after.loss_base
    assert diagnose(training) == after


def test_the_nearest_entry_to_a_copied_row_is_the_one_it_was_copied_from(tokenizer, text_encoder):
    vocabulary, cat = text_encoder.embed_tokens.weight.detach(), tokenizer("cat").input_ids[0]
    rows = {"<qrs>": vocabulary[[cat + 1, cat]], "<zwx>": 3 * vocabulary[cat : cat + 1]}  # of several vectors the first counts
    found = nearest_tokens(PlaceholderTokens(151665, rows, vocabulary.shape[1]), vocabulary, tokenizer)
    assert found["<qrs>"][0] == [tokenizer.decode([cat + 1]), pytest.approx(1.0, abs=1e-5)]
    nearest = found["<zwx>"]
    assert nearest[0] == ["cat", pytest.approx(1.0, abs=1e-5)]
    assert len(nearest) == 5
    assert nearest == sorted(nearest, key=lambda entry: -entry[1])


@pytest.mark.parametrize(("row_reset", "told"), [(1.0, True), (1.04, True), (1.06, False), (1.5, False)])
def test_an_embedding_that_makes_no_difference_is_told_of(row_reset, told):
    lines = replace(FOUND, loss_row_reset=row_reset).lines()
    assert any("the LoRA carries the subject" in line for line in lines) == told


def test_an_embedding_that_never_changed_is_warned_of_as_that():
    lines = replace(FOUND, loss_row_reset=1.0, unchanged=["<zwx>"]).lines()
    assert lines[2] == (
        "Warning: the embedding of <zwx> is as it was before training: no step had a prompt with the token in it, or "
        "placeholder_learning_rate is 0"
    )
    assert len(lines) == 3


def test_a_training_that_gained_nothing_is_warned_of_as_that():
    lines = replace(FOUND, loss=2.0, loss_row_reset=2.0).lines()
    assert lines[-1] == "Warning: the training did not lower the loss: train for longer, or change learning_rate"
    assert not any("the LoRA carries" in line for line in lines)


def test_the_lines_name_the_losses_and_the_nearest_entries():
    first, second = FOUND.lines()
    assert (
        first
        == "Loss on fixed noise: 1.0000; with the token's embedding reset 1.5000; without the LoRA 1.6000; base model 2.0000"
    )
    assert second == "Nearest to <zwx>: 'cat' 0.50"
    assert FOUND.meta()["diagnostics"]["row_share"] == 0.5


def test_a_zero_prior_training_logs_and_stores_its_diagnostics(zero_prior, baseline):
    found = zero_prior.meta["diagnostics"]
    assert set(found) == {"loss", "loss_row_reset", "loss_lora_off", "loss_base", "nearest_tokens", "unchanged", "row_share"}
    assert len(found["nearest_tokens"]["<zwx>"]) == 5
    assert sum(line.startswith("Loss on fixed noise: ") for line in zero_prior.log) == 1
    assert "diagnostics" not in baseline.meta
    assert not any(line.startswith("Loss on fixed noise: ") for line in baseline.log)


def test_rows_are_put_back_after_an_error(training):
    before = training.tokens.rows.detach().clone()
    with pytest.raises(KeyError), rows_as(training.tokens, torch.zeros_like(before)):
        assert not training.tokens.rows.any()
        raise KeyError
    assert torch.equal(training.tokens.rows, before)

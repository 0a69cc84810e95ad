"""The memory plan: its counts are those of the real models, its peaks those of real steps, and it chooses what fits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.full_size import FULL_TEXT_ENCODER, RandomBase
from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS
from placeholder.model.base import BaseModel
from placeholder.model.captioner import vlm_bytes
from placeholder.model.offloading import Streamed
from placeholder.training.context import Context, Training
from placeholder.training.examples import draw_sample
from placeholder.training.loop import Schedule, train_steps
from placeholder.training.losses import sample_losses
from placeholder.training.memory_plan import memory_needs, plan_memory
from placeholder.training.setup import prepare
from placeholder.transformer.checkpointing import measure
from placeholder.weights.layout import LORA_NAME, embedding_name
from tests.conftest import SHORT
from tests.support.bases import WatchedBase
from tests.support.peak import PeakBytes
from tests.support.samples import train

FULL_SIZE = RandomBase("Qwen-Image with random weights", torch.device("cuda"), torch.bfloat16)  # counted alone
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",), "prior_preservation": 4.0}
WITH, WITHOUT = TrainConfig(**TOKEN), TrainConfig()
GRID, PROMPT = (64, 64), 34 + 128  # 1024 x 1024 pixels; a prompt of 128 tokens inside the template


def prepared(dataset: Path, base: BaseModel, kind: str, offloaded: int = 0, **options) -> Training:
    """A training that is ready to start, with what the plan calls `kind` and so many layers of its text encoder offloaded."""

    def planned(*given):
        plan = plan_memory(*given)
        on_gpu = memory_needs(replace(given[0], device=torch.device("cuda")), *given[1:4])
        need = next(need for need in (*plan.needs, *on_gpu) if need.name == kind)
        return replace(plan, chosen=replace(need, offloaded=offloaded))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("placeholder.training.setup.plan_memory", planned)
        return prepare(dataset, Context(TrainConfig(**SHORT | options), base, log=lambda line: None))


def largest_batch(training: Training, batch_size: int) -> list:
    """A batch of the largest crop with the longest prompt."""
    longest = max((example.input_ids for example in training.state.sampler.examples), key=len)
    largest = replace(max(training.state.sampler.examples, key=lambda example: len(example.latents)), input_ids=longest)
    return [draw_sample(largest, (), 0.0, torch.Generator())] * batch_size


@pytest.mark.parametrize(
    ("options", "offloaded"), [({}, 0), (TOKEN, 0), (TOKEN, 1), (TOKEN, 2), ({"batch_size": 2, "rank": 8}, 0)]
)
def test_what_a_step_keeps_is_predicted_without_any_weight(base, dataset, options, offloaded):
    training = prepared(dataset, base, "none", offloaded, **options)
    state, prompt_embeds = training.state, training.prompt_embeds
    batch, encoder = largest_batch(training, options.get("batch_size", 1)), prompt_embeds.text_encoder
    found = measure(
        state.transformer,
        lambda: sample_losses(state.denoiser, prompt_embeds, batch).sum(),
        encoder.parameters() if encoder else (),
    )
    example = batch[0].example
    need = memory_needs(base, TrainConfig(**SHORT | options), example.grid, len(example.input_ids), offloaded)[0]
    assert need.footprint == found
    weights = [parameter for parameter in state.transformer.parameters() if not parameter.requires_grad]
    assert need.transformer == sum(weight.nbytes for weight in weights)
    streamed = [layer for layer in encoder.layers if isinstance(layer.forward, Streamed)] if encoder else []
    assert len(streamed) == offloaded
    elsewhere = {weight for layer in streamed[1:] for weight in layer.parameters()}
    assert need.text_encoder == sum(weight.nbytes for weight in {*(encoder.parameters() if encoder else ())} - elsewhere)
    # Weights, gradients and Adam's two states, in fp32.
    assert need.lora == 4 * 4 * sum(parameter.numel() for parameter in state.lora)


@pytest.mark.parametrize(("kind", "checkpoint"), [("none", True), ("nf4", False), ("int8+table", False)])
def test_the_expected_peak_is_that_of_a_real_step(dataset, small_base, kind, checkpoint):
    options = TOKEN | {"prior_preservation": 0.0, "caption_dropout": 0.0, "batch_size": 4, "rank": 8}
    training = prepared(dataset, small_base, kind, **options)
    state = training.state
    state.sampler.examples = [largest_batch(training, 1)[0].example] * 4
    need = training.plan.chosen
    state.checkpointing.checkpointed = need.footprint.blocks if checkpoint else 0
    steps = train_steps(state, Schedule(3), SINGLE_PROCESS)
    next(steps)  # the optimizer makes its states
    with PeakBytes() as counted:
        next(steps)
    gradients = 4 * sum(parameter.numel() for parameter in state.lora)
    expected = need.footprint.total(state.checkpointing.checkpointed) + gradients  # weights and states were there before
    assert 0.95 * counted.peak < expected < 1.25 * counted.peak


def chosen(config: TrainConfig, gigabytes: float) -> tuple[str, int, int]:
    """Storage, checkpointed blocks, and offloaded layers of the text encoder, for 1024 x 1024 pixels on a card."""
    plan = plan_memory(FULL_SIZE, config, GRID, PROMPT, round(gigabytes * 1e9))
    checkpointed = plan.chosen.checkpointed(plan.free)
    assert plan.chosen.peak(checkpointed) <= plan.free == round(0.9 * gigabytes * 1e9)
    return plan.chosen.name, checkpointed, plan.chosen.offloaded


QUANTIZED = {"quantize": True}


@pytest.mark.parametrize(
    ("config", "gigabytes", "expected"),
    [
        (WITH, 80, ("none+table", 0, 0)),
        (WITHOUT, 80, ("none", 0, 0)),
        (WITHOUT, 48, ("none+table", 21, 0)),
        (replace(WITH, **QUANTIZED), 48, ("int8+table", 22, 0)),
        (WITH, 48, ("none+table", 52, 9)),
        (replace(WITH, **QUANTIZED), 32, ("nf4+table", 47, 0)),
        (replace(WITH, **QUANTIZED), 24, ("int8+table", 52, 26)),
        (replace(WITHOUT, **QUANTIZED), 48, ("int8+table", 0, 0)),
        (replace(WITHOUT, **QUANTIZED), 24, ("int8+table", 47, 0)),
        (replace(WITH, **QUANTIZED), 16, ("nf4+table", 52, 27)),
    ],
)
def test_the_full_size_model_fits_the_cards_that_people_have(config, gigabytes, expected):
    """Counted, not measured on such cards."""
    assert chosen(config, gigabytes) == expected


def test_one_layer_less_would_not_fit_with_an_eighth_of_the_blocks_left_to_checkpoint():
    fits, too_much = (memory_needs(FULL_SIZE, WITH, GRID, PROMPT, offloaded)[1].peak(52) for offloaded in (9, 8))
    assert fits <= 0.9 * 48e9 < too_much


def test_at_the_end_of_the_backward_pass_the_casts_of_the_lora_and_of_its_gradients_are_there():
    config = replace(WITHOUT, rank=256, resolution=(64,))
    need = memory_needs(FULL_SIZE, config, (4, 4), PROMPT)[0]
    parameters = need.lora // 16  # weights, gradients and two states in fp32
    assert need.footprint.total(60) == 2 * 2 * parameters


@pytest.mark.parametrize(
    ("config", "gigabytes", "remedy"),
    [
        (
            WITH,
            32,
            "needs 31.4 GB, 28.8 GB may be used: set quantize to true, or give a smaller resolution, or take a larger GPU$",
        ),
        (
            replace(WITH, **QUANTIZED),
            12,
            "needs 11.3 GB, 10.8 GB may be used: give a smaller resolution, or take a larger GPU$",
        ),
        (replace(WITH, **QUANTIZED, batch_size=2), 12, "used: give a smaller resolution or batch_size, or take a larger GPU$"),
    ],
)
def test_what_does_not_fit_is_told_the_levers(config, gigabytes, remedy):
    with pytest.raises(ValueError, match="^training at 1024x1024 pixels, batch [12], rank 32, with.* a token .*" + remedy):
        plan_memory(FULL_SIZE, config, GRID, PROMPT, round(gigabytes * 1e9))


SEEING = RandomBase(
    "with the published vision tower",
    torch.device("cpu"),
    torch.bfloat16,
    {"text_encoder": {"text_config": FULL_TEXT_ENCODER, "vision_config": {"hidden_size": 1280}, "tie_word_embeddings": False}},
)


def test_the_whole_text_encoder_is_counted_as_it_is_published():
    weights = 16_584_333_312  # bytes of the published files; without the vision tower and the head 14,141,238,272
    assert weights < vlm_bytes(SEEING) < 1.05 * weights


def test_a_resumed_training_keeps_what_its_checkpoint_was_made_with():
    """Batches of several images are equal with and without the table only up to rounding."""
    for stored in (("none", False), ("none", True)):
        plan = plan_memory(FULL_SIZE, WITH, GRID, PROMPT, 80 * 10**9, stored)
        assert (plan.chosen.quantization, plan.chosen.tabled) == stored


def test_captioning_is_planned():
    without, with_it = (memory_needs(SEEING, replace(WITHOUT, autocaption=flag), GRID, PROMPT)[0] for flag in (False, True))
    assert with_it.peak(0) >= with_it.encoding == vlm_bytes(SEEING) > without.encoding


def test_an_offloaded_text_encoder_is_said_and_trains_the_same(base, dataset, tmp_path):
    lines = plan_memory(FULL_SIZE, WITH, GRID, PROMPT, 48 * 10**9).lines()
    assert "text encoder, 9 offloaded" in lines[3] and lines[-1].startswith("Warning: 9 layers of the text encoder do not fit")

    def offloading(*given):
        plan = plan_memory(*given)
        return replace(plan, chosen=replace(plan.chosen, offloaded=1))

    config = TrainConfig(**SHORT, **TOKEN)
    found = [train(dataset, config, tmp_path / f"{plan.__name__}.zip", base, plan) for plan in (plan_memory, offloading)]
    for name in (LORA_NAME, embedding_name("<zwx>")):
        resident, offloaded = (run.tensors(name) for run in found)
        assert resident.keys() == offloaded.keys() and all(torch.equal(resident[key], offloaded[key]) for key in resident)


def test_the_plan_is_a_table_in_gigabytes():
    lines = plan_memory(FULL_SIZE, WITH, GRID, PROMPT, 80 * 10**9).lines()
    assert lines[0].startswith(
        "Memory plan for training at 1024x1024 pixels, batch 1, rank 32, with a token; 72.0 GB may be used"
    )
    table = {line[:30].strip(): line[30:].split() for line in lines[1:]}
    assert table["GB expected"] == ["none", "none+table", "*", "int8+table", "nf4+table"]
    assert table["transformer"][:2] == ["40.9", "27.2"] and table["text encoder"] == ["13.1"] * 4
    columns = [
        [float(table[row][i]) for row in ("transformer", "text encoder", "LoRA, gradients, optimizer", "activations")]
        for i in range(4)
    ]
    assert [float(cell) for cell in table["peak"]] == pytest.approx([sum(column) for column in columns], abs=0.2)


def test_quantize_takes_four_bits_where_eight_do_not_fit(base, dataset, tmp_path):
    config = TrainConfig(**SHORT, **QUANTIZED, **TOKEN)
    none, int8, nf4 = memory_needs(base, config, (4, 4), 34 + 10)
    assert nf4.peak(2) < int8.peak(2) < none.peak(2)
    free = round((nf4.peak(2) + int8.peak(2)) / 2 / 0.9)
    run = train(dataset, config, tmp_path / "nf4.zip", WatchedBase.of(base, frees=[free, free]))
    assert run.meta["transformer_storage"] == "nf4"
    assert any(value.any() for key, value in run.tensors(LORA_NAME).items() if "lora_B" in key)


def test_what_does_not_fit_is_refused_before_any_weight_is_loaded(base, dataset, tmp_path):
    card = WatchedBase.of(base, frees=[10**6])
    with pytest.raises(ValueError, match="needs .* GB, 0.001 GB may be used"):
        train(dataset, TrainConfig(**SHORT), tmp_path / "never.zip", card)
    assert set(card.loaded) <= {"tokenizer"}


def test_what_is_trained_is_what_was_planned(base, dataset):
    config = TrainConfig(**SHORT, **TOKEN)
    need, *_ = memory_needs(base, config, (4, 4), 34 + 10)
    free = round((need.peak(1) + need.peak(0)) / 2 / 0.9)
    loaded = need.transformer + need.text_encoder + need.lora // 4  # the LoRA without gradients and states
    training = prepare(dataset, Context(config, WatchedBase.of(base, frees=[free, free - loaded]), log=lambda line: None))
    assert training.state.checkpointing.checkpointed == training.plan.chosen.checkpointed(training.plan.free) > 0

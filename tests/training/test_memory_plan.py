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
from placeholder.training import setup as prepare_module
from placeholder.training.examples import draw_sample
from placeholder.training.losses import sample_losses
from placeholder.training.memory_plan import plan_training
from placeholder.training.needs import training_needs
from placeholder.training.noise_levels import levels_in_use
from placeholder.training.setup import prepare
from placeholder.training.training import Training
from placeholder.transformer.checkpointing import measure
from placeholder.weights.archive import LORA_NAME
from tests.conftest import SHORT
from tests.support.peak import PeakBytes
from tests.support.samples import train

FULL_SIZE = RandomBase("Qwen-Image with random weights", torch.device("cuda"), torch.bfloat16)  # counted alone
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
WITH, WITHOUT = TrainConfig(**TOKEN), TrainConfig()
GRID, PROMPT = (64, 64), 34 + 128  # 1024 x 1024 pixels; a prompt of 128 tokens inside the template


def prepared(dataset: Path, base: BaseModel, storage: str, monkeypatch, **options) -> Training:
    """A training that is ready to start, with the transformer's weights in that storage, by the name it has in the plan."""
    planned = prepare_module.plan_training

    def with_storage(*given):
        plan = planned(*given)
        on_gpu = training_needs(replace(base, device=torch.device("cuda")), *given[1:4])
        return replace(plan, chosen=next(need for need in (*plan.needs, *on_gpu) if need.name == storage))

    monkeypatch.setattr(prepare_module, "plan_training", with_storage)
    config = TrainConfig(**SHORT | options)
    training = prepare(dataset, config, base, log=lambda line: None)
    monkeypatch.setattr(prepare_module, "plan_training", planned)
    return training


def largest_batch(training: Training, batch_size: int) -> list:
    """A batch of the largest crop with the longest prompt."""
    longest = max((example.input_ids for example in training.examples), key=len)
    largest = replace(max(training.examples, key=lambda example: len(example.latents)), input_ids=longest)
    return [draw_sample(largest, (), 0.0, torch.Generator())] * batch_size


@pytest.mark.parametrize("options", [{}, TOKEN, {"batch_size": 2, "rank": 8}])
def test_what_a_step_keeps_is_foretold_without_any_weight(base, dataset, monkeypatch, options):
    training = prepared(dataset, base, "full", monkeypatch, **options)
    batch = largest_batch(training, options.get("batch_size", 1))
    transformer, prompt_embeds = training.train_state.transformer, training.prompt_embeds
    encoder = prompt_embeds.text_encoder
    found = measure(
        transformer,
        lambda: sample_losses(transformer, prompt_embeds, batch).sum(),
        encoder.parameters() if encoder else (),
    )
    need = training.plan.needs[0]
    assert need.footprint == found
    weights = [parameter for parameter in transformer.parameters() if not parameter.requires_grad]
    assert need.transformer == sum(weight.nbytes for weight in weights)
    assert need.text_encoder == (sum(weight.nbytes for weight in encoder.parameters()) if encoder else 0)
    # Weights, gradients and Adam's two states, in fp32.
    assert need.lora == 4 * 4 * sum(parameter.numel() for parameter in training.train_state.lora)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("storage", ["full", "int8", "nf4", "full+table", "int8+table"])
def test_the_expected_height_is_that_of_a_real_step(dataset, small_base, monkeypatch, storage, recompute):
    options = TOKEN | {"prior_preservation": 0.0, "caption_dropout": 0.0, "batch_size": 4, "rank": 8}
    training = prepared(dataset, small_base, storage, monkeypatch, **options)
    largest = largest_batch(training, 1)[0].example
    # Four prompts that differ in one word: equal ones would be encoded once.
    prompts = [largest.input_ids[:34] + (word,) + largest.input_ids[35:] for word in range(4)]
    training.examples[:] = [replace(largest, input_ids=ids) for ids in prompts]
    need = training.plan.chosen
    checkpointed = need.footprint.blocks if recompute else 0
    training.train_state.checkpointing.checkpointed = checkpointed
    config = TrainConfig(**SHORT | options)
    if need.tabled:  # of the right size, whatever the numbers in it
        levels = levels_in_use(small_base, config, training.examples, training.empty_ids, training.position, SINGLE_PROCESS)
        training.train_state.transformer.time_text_embed.numbers = dict.fromkeys(levels.tolist(), 0)
    steps = training.steps(config)
    next(steps)  # the optimizer makes its states
    with PeakBytes() as counted:
        next(steps)
    gradients = 4 * sum(parameter.numel() for parameter in training.train_state.lora)
    expected = need.footprint.total(checkpointed) + gradients  # weights and states were there before
    assert 0.95 * counted.peak < expected < 1.25 * counted.peak


def chosen(config: TrainConfig, gigabytes: float) -> tuple[str, int]:
    """Storage and number of checkpointed blocks for 1024 x 1024 pixels on a card."""
    plan = plan_training(FULL_SIZE, config, GRID, PROMPT, round(gigabytes * 1e9))
    checkpointed = plan.chosen.checkpointed(plan.free)
    assert plan.chosen.peak(checkpointed) <= plan.free == round(0.9 * gigabytes * 1e9)
    return plan.chosen.name, checkpointed


QUANTIZED = {"quantize": True}


@pytest.mark.parametrize(
    ("config", "gigabytes", "expected"),
    [
        (WITH, 80, ("full+table", 0)),
        (WITHOUT, 80, ("full", 0)),
        (WITHOUT, 48, ("full+table", 21)),
        (replace(WITH, **QUANTIZED), 48, ("int8+table", 25)),
        (replace(WITH, **QUANTIZED), 32, ("nf4+table", 50)),
        (replace(WITHOUT, **QUANTIZED), 48, ("int8+table", 0)),
        (replace(WITHOUT, **QUANTIZED), 24, ("int8+table", 46)),
    ],
)
def test_the_full_size_model_fits_the_cards_that_people_have(config, gigabytes, expected):
    """Counted, not measured on such cards."""
    assert chosen(config, gigabytes) == expected


@pytest.mark.parametrize(
    ("config", "gigabytes", "remedy"),
    [
        (WITH, 48, "needs 45.5 GB, 43.2 GB may be used: set quantize to true$"),
        (replace(WITH, batch_size=8, **QUANTIZED), 38, "set resolution to 512$"),
        (
            replace(WITH, **QUANTIZED),
            24,
            "set quantize to true and train without the token, so that the text encoder need not stay$",
        ),
        (replace(WITHOUT, **QUANTIZED), 12, "take a GPU with 1[5-9] GB free, and set quantize to true$"),
    ],
)
def test_what_does_not_fit_is_told_what_would(config, gigabytes, remedy):
    with pytest.raises(ValueError, match="^training at 1024x1024 pixels, batch [18], rank 32, with.* a token .*" + remedy):
        plan_training(FULL_SIZE, config, GRID, PROMPT, round(gigabytes * 1e9))


SEEING = RandomBase(
    "with the published vision tower",
    torch.device("cpu"),
    torch.bfloat16,
    {"text_encoder": {"text_config": FULL_TEXT_ENCODER, "vision_config": {"hidden_size": 1280}, "tie_word_embeddings": False}},
)


def test_the_whole_text_encoder_is_counted_as_it_is_published():
    weights = 16_584_333_312  # bytes of the published files; without the vision tower and the head 14,141,238,272
    assert weights < vlm_bytes(SEEING) < 1.05 * weights


def test_autocaption_can_be_the_height_and_is_then_what_is_refused(vision_base):
    config = TrainConfig(**SHORT)
    blind, seeing = (training_needs(vision_base, replace(config, autocaption=on), (4, 4), 60) for on in (False, True))
    assert seeing[0].peak(0) == seeing[0].encoding == vlm_bytes(vision_base) > blind[0].peak(0)
    assert [replace(need, encoding=0) for need in seeing] == [replace(need, encoding=0) for need in blind]
    free = round(0.5 * (seeing[0].peak(0) + blind[0].peak(0)) / 0.9)
    with pytest.raises(
        ValueError, match="set autocaption to false, which needs the text encoder's vision tower too, and write"
    ):
        plan_training(vision_base, replace(config, autocaption=True), (4, 4), 60, free)
    assert plan_training(vision_base, config, (4, 4), 60, free).chosen.storage == "full"


def test_the_plan_is_a_table_in_gigabytes():
    lines = plan_training(FULL_SIZE, WITH, GRID, PROMPT, 80 * 10**9).lines()
    assert lines[0].startswith(
        "Memory plan for training at 1024x1024 pixels, batch 1, rank 32, with a token; 72.0 GB may be used"
    )
    table = {line[:30].strip(): line[30:].split() for line in lines[1:]}
    assert table["GB expected"] == ["full", "full+table", "*", "int8+table", "nf4+table"]
    assert table["transformer"][:2] == ["40.9", "27.2"] and table["text encoder"] == ["14.1"] * 4
    columns = [
        [float(table[row][i]) for row in ("transformer", "text encoder", "LoRA, gradients, optimizer", "activations")]
        for i in range(4)
    ]
    assert [float(cell) for cell in table["peak"]] == pytest.approx([sum(column) for column in columns], abs=0.2)


def test_quantize_takes_four_bits_where_eight_do_not_fit(base, dataset, tmp_path, monkeypatch):
    config = TrainConfig(**SHORT, **QUANTIZED, **TOKEN)
    grid, prompt = (4, 4), 34 + 10
    full, int8, nf4 = training_needs(base, config, grid, prompt)
    assert nf4.peak(2) < int8.peak(2) < full.peak(2)
    free = round((nf4.peak(2) + int8.peak(2)) / 2 / 0.9)
    monkeypatch.setattr(prepare_module, "free_bytes", lambda device: free)
    run = train(dataset, config, tmp_path / "nf4.zip", base)
    assert run.meta["transformer_storage"] == "nf4"
    assert any(value.any() for key, value in run.tensors(LORA_NAME).items() if "lora_B" in key)


def test_what_does_not_fit_is_refused_before_any_weight_is_loaded(base, dataset, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("weights were loaded")

    for name in ("load_vae", "load_text_encoder", "load_transformer"):
        monkeypatch.setattr(prepare_module, name, never)
    monkeypatch.setattr(prepare_module, "free_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match="needs .* GB, 0.001 GB may be used"):
        train(dataset, TrainConfig(**SHORT), tmp_path / "never.zip", base)


def test_what_is_trained_is_what_was_planned(base, dataset, tmp_path, monkeypatch):
    config = TrainConfig(**SHORT, **TOKEN)
    full, *_ = training_needs(base, config, (4, 4), 34 + 10)
    free = round((full.peak(1) + full.peak(0)) / 2 / 0.9)
    loaded = full.transformer + full.text_encoder + full.lora // 4  # the LoRA without gradients and states
    frees = iter([free, free - loaded])
    monkeypatch.setattr(prepare_module, "free_bytes", lambda device: next(frees))
    training = prepare(dataset, config, base, log=lambda line: None)
    assert training.train_state.checkpointing.checkpointed == training.plan.chosen.checkpointed(training.plan.free) > 0

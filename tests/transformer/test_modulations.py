"""The table of modulations: the same numbers without the weights, in a pass, in a training, and in all that a training does beside it."""

from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job
from placeholder.lora.adapter import add_lora
from placeholder.model.loading import load_transformer
from placeholder.training import needs as needs_module
from placeholder.training import setup as prepare_module
from placeholder.training.losses import predict_velocity
from placeholder.training.memory_plan import plan_training
from placeholder.training.needs import training_needs
from placeholder.training.noise_levels import levels_in_use
from placeholder.training.setup import prepare
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.modulations import modulation_layers
from placeholder.weights.archive import LORA_NAME, embedding_name
from tests.conftest import SHORT
from tests.model.test_quantization import real_bytes
from tests.support.samples import train

LEVELS = torch.tensor([0.25, 0.5, 0.7, 0.25])
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
GRID, PROMPT = (4, 4), 34 + 10


def tabled_plans(monkeypatch, chosen: bool = True) -> None:
    """Let trainings table their modulations, as they do on a GPU, or let them have the choice alone."""
    planned = prepare_module.plan_training

    def with_table(*given):
        plan = planned(*given)
        tabled = replace(plan.chosen, tabled=True)
        return replace(plan, needs=(*plan.needs, tabled), chosen=tabled if chosen else plan.chosen)

    monkeypatch.setattr(prepare_module, "plan_training", with_table)


class Passes:
    """A transformer, and one whose modulations are a table, with the same LoRA that is not zero."""

    def __init__(self, base, dtype: torch.dtype):
        base = replace(base, dtype=dtype)
        self.models = load_transformer(base), load_transformer(base, sigmas=LEVELS)
        self.lora = [add_lora(model, 4, seed=0) for model in self.models]
        for parameters in self.lora:
            generator = torch.Generator().manual_seed(0)
            for parameter in parameters:
                parameter.data.normal_(std=0.1, generator=generator)

    def predicted(self, sigmas: list[float], checkpointed: int = 0):
        """What each predicts, and the gradients of its LoRA."""
        generator = torch.Generator().manual_seed(1)
        noisy = torch.randn(len(sigmas), 16, 64, generator=generator)
        embeds = torch.randn(len(sigmas), 5, 32, generator=generator)
        for model, parameters in zip(self.models, self.lora, strict=True):
            BlockCheckpointing(model, checkpointed)
            found = predict_velocity(model, noisy, torch.tensor(sigmas), embeds, (4, 4))
            found.float().square().mean().backward()
            yield found.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_one_picture_is_predicted_as_without_the_table_bit_for_bit(base, dtype, checkpointed):
    passes = Passes(base, dtype)
    for level in LEVELS.tolist():
        (expected, gradients), (found, same) = passes.predicted([level], checkpointed)
        assert torch.equal(found, expected)
        assert len(same) == len(gradients) > 0
        assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))


def test_a_batch_of_several_levels_is_predicted_to_rounding(base):
    (expected, gradients), (found, same) = Passes(base, torch.float32).predicted([0.7, 0.25, 0.7])
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-7) for one, other in zip(gradients, same, strict=True))
    assert not torch.allclose(found[0], found[2], atol=1e-2)  # other pictures


def test_levels_are_told_apart(base):
    passes = Passes(base, torch.float32)
    low, high = (list(passes.predicted([level]))[1][0] for level in (0.25, 0.7))
    assert not torch.allclose(low, high, atol=1e-3)


def test_a_level_that_the_table_was_not_made_for_is_no_other(base):
    with pytest.raises(RuntimeError, match="the table of modulations has no noise level 0.625"):
        list(Passes(base, torch.float32).predicted([0.625]))


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_weights_are_gone_as_was_counted(base, quantization):
    on_gpu = replace(base, device=torch.device("cuda"))  # counted from shapes alone
    need = next(
        need
        for need in training_needs(on_gpu, TrainConfig(**SHORT), GRID, PROMPT)
        if need.tabled and need.quantization == quantization
    )
    plain, tabled = load_transformer(base), load_transformer(base, quantization, sigmas=LEVELS)
    spared = sum(parameter.nbytes for layer in modulation_layers(plain) for parameter in layer.parameters())
    assert real_bytes(tabled) == pytest.approx(need.transformer, rel=0 if quantization == "none" else 0.02)
    assert real_bytes(tabled) <= real_bytes(plain) - spared
    rows = tabled.time_text_embed.rows
    assert rows.shape[0] == 3  # each level once
    untabled = training_needs(base, TrainConfig(**SHORT), GRID, PROMPT)[0]
    assert need.footprint.rest - untabled.footprint.rest == rows[0].nbytes


def test_the_table_computes_at_full_precision_with_any_quantization(base):
    plain, stored = (load_transformer(base, quantization, LEVELS) for quantization in ("none", "nf4"))
    assert torch.equal(stored.time_text_embed.rows, plain.time_text_embed.rows)


@pytest.mark.parametrize("options", [TOKEN, {"batch_size": 2, "caption_dropout": 0.5}])
def test_a_training_learns_the_same_and_draws_the_same_beside_it(base, dataset, tmp_path, monkeypatch, options):
    config = TrainConfig(**SHORT | {"report": True} | options)
    plain = train(dataset, config, tmp_path / "plain.zip", base)
    tabled_plans(monkeypatch)
    tabled = train(dataset, config, tmp_path / "tabled.zip", base)
    assert (plain.meta["modulations_tabled"], tabled.meta["modulations_tabled"]) == (False, True)
    assert any(line.startswith("Modulations: a table of ") for line in tabled.log)
    names = [LORA_NAME, *([embedding_name("<zwx>")] if "placeholder_token" in options else [])]
    alone = config.batch_size == 1
    for name in names:
        expected, found = plain.tensors(name), tabled.tensors(name)
        for key, value in expected.items():
            assert torch.equal(value, found[key]) if alone else torch.allclose(value, found[key], rtol=0.05, atol=1e-3)
    if alone:
        assert tabled.meta["diagnostics"] == plain.meta["diagnostics"]
        assert tabled.entry("report/grid.jpg") == plain.entry("report/grid.jpg")


@pytest.mark.parametrize("fp32_norms", [False, True])
def test_a_training_in_bf16_draws_as_on_a_gpu(base, dataset, tmp_path, monkeypatch, fp32_norms):
    """Under CUDA's autocast norms are fp32; with them the latents of a guided picture, and from then on the timesteps."""
    tabled_plans(monkeypatch)
    if fp32_norms:
        norm = torch.norm
        monkeypatch.setattr(torch, "norm", lambda x, *given, **options: norm(x.float(), *given, **options))
    options = {"report": True, "resolution": (128,), "steps": 3} | TOKEN
    run = train(dataset, TrainConfig(**SHORT | options), tmp_path / "bf16.zip", replace(base, dtype=torch.bfloat16))
    assert [line for line in run.log if "not drawn" in line] == []
    assert run.entry("report/grid.jpg")


def test_a_resumed_training_knows_the_levels_that_are_left(base, dataset, tmp_path, monkeypatch):
    tabled_plans(monkeypatch)
    config = TrainConfig(**SHORT | TOKEN)
    whole = train(dataset, config, tmp_path / "whole.zip", base)
    folder = CheckpointFolder(tmp_path / "checkpoints", 10)
    finetune(Job(dataset, config, tmp_path / "first.zip", checkpoints=folder), base, log=lambda line: None)
    monkeypatch.undo()
    tabled_plans(monkeypatch, chosen=False)  # the checkpoint says that it had one
    log: list[str] = []
    again = tmp_path / "again.zip"
    finetune(Job(dataset, config, again, resume_from=folder.path), base, log.append)
    assert "Resumed from checkpoint-000010.safetensors after step 10" in log
    found = replace(whole, archive=again).tensors(LORA_NAME)
    assert all(torch.equal(value, found[key]) for key, value in whole.tensors(LORA_NAME).items())
    levels = [int(line.split("table of ")[1].split()[0]) for line in [*whole.log, *log] if line.startswith("Modulations")]
    assert levels[1] == levels[0] - 10  # one a step


def test_a_resumed_training_has_a_table_where_it_had_one(base):
    on_gpu, config = replace(base, device=torch.device("cuda")), TrainConfig(**SHORT)
    plan = plan_training(on_gpu, config, GRID, PROMPT, 10**9)
    assert not plan.chosen.tabled  # nothing would have to be checkpointed
    assert plan.as_before(True).chosen.tabled
    assert not plan.as_before(False).chosen.tabled and plan.as_before(None) == plan
    without, with_table, *_ = needs = tuple(replace(need, encoding=0) for need in plan.needs)
    scarce = replace(plan, needs=needs, free=with_table.peak(2), chosen=with_table)
    assert with_table.tabled and not without.tabled
    assert scarce.as_before(False).chosen.tabled  # it does not fit without


def test_a_model_whose_modulations_depend_on_more_has_no_table(base, monkeypatch):
    on_gpu, config = replace(base, device=torch.device("cuda")), TrainConfig(**SHORT)
    shell = needs_module.transformer_shell

    def editing(given):
        found = shell(given)
        found.register_to_config(zero_cond_t=True)
        return found

    monkeypatch.setattr(needs_module, "transformer_shell", editing)
    found = needs_module.training_needs(on_gpu, config, GRID, PROMPT)
    assert [need.name for need in found] == ["none", "int8", "nf4"]


def test_the_levels_are_drawn_by_a_copy_and_are_few_in_bf16(base, dataset):
    config = TrainConfig(**SHORT | TOKEN)
    training = prepare(dataset, config, base, log=lambda line: None)
    before = training.position.generator.get_state().clone()

    def levels(steps: int, dtype: torch.dtype, processes: Processes = SINGLE_PROCESS) -> torch.Tensor:
        long = replace(config, steps=steps)
        given = long, training.examples, training.empty_ids, training.position, processes
        return levels_in_use(replace(base, dtype=dtype), *given)

    beside = 1 + 16  # the middle, and what the diagnostics measure on
    assert len(levels(100, torch.float32)) == 100 + beside
    assert len(levels(2000, torch.bfloat16)) < 600
    halves = [set(levels(50, torch.float32, Processes(2, index)).tolist()) for index in (0, 1)]
    assert len(halves[0] & halves[1]) == beside and len(halves[0] | halves[1]) == 100 + beside
    assert training.position.step == 0 and torch.equal(before, training.position.generator.get_state())

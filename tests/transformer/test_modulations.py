"""The table of modulations: the same numbers without the weights, in a pass and in a whole training."""

from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.lora.adapter import add_lora
from placeholder.model.loading import load_transformer, transformer_shell
from placeholder.model.quantization import dequantized_bytes
from placeholder.training.losses import Denoiser
from placeholder.training.memory_plan import memory_needs, plan_memory
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.modulations import depend_on_timestep_alone, modulation_layers
from placeholder.weights.archive import LORA_NAME, embedding_name
from tests.conftest import SHORT
from tests.model.test_quantization import real_bytes
from tests.support.samples import train

SIGMAS = torch.tensor([0.25, 0.5, 0.7, 0.25])
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",), "prior_preservation": 4.0}
GRID, PROMPT = (4, 4), 34 + 10


def tabled(*given):
    """The plan, with a table of modulations as on a GPU."""
    plan = plan_memory(*given)
    chosen = replace(plan.chosen, tabled=True)
    return replace(plan, needs=(*plan.needs, chosen), chosen=chosen)


class Passes:
    """A transformer, and one whose modulations are a table, with the same LoRA that is not zero."""

    def __init__(self, base, dtype: torch.dtype):
        base = replace(base, dtype=dtype)
        self.models = load_transformer(base), load_transformer(base, sigmas=SIGMAS)
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
            found = Denoiser(model)(noisy, torch.tensor(sigmas), embeds, (4, 4))
            found.float().square().mean().backward()
            yield found.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_one_image_is_predicted_as_without_the_table_bit_for_bit(base, dtype, checkpointed):
    passes = Passes(base, dtype)
    for sigma in SIGMAS.tolist():
        (expected, gradients), (found, same) = passes.predicted([sigma], checkpointed)
        assert torch.equal(found, expected)
        assert len(same) == len(gradients) > 0
        assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))


def test_a_batch_of_several_sigmas_is_predicted_to_rounding(base):
    (expected, gradients), (found, same) = Passes(base, torch.float32).predicted([0.7, 0.25, 0.7])
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-7) for one, other in zip(gradients, same, strict=True))
    assert not torch.allclose(found[0], found[2], atol=1e-2)  # other images


def test_sigmas_are_told_apart_and_the_nearest_is_taken(base):
    passes = Passes(base, torch.float32)
    low, high, near = (list(passes.predicted([sigma]))[1][0] for sigma in (0.25, 0.7, 0.7004))
    assert not torch.allclose(low, high, atol=1e-3)
    assert torch.equal(high, near)


def test_a_sigma_that_the_table_was_not_made_for_is_no_other(base):
    with pytest.raises(RuntimeError, match="the table of modulations has no sigma near 0.625"):
        list(Passes(base, torch.float32).predicted([0.625]))


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_the_weights_are_gone_as_was_counted(base, kind):
    on_gpu = replace(base, device=torch.device("cuda"))  # counted from shapes alone
    need = next(
        need for need in memory_needs(on_gpu, TrainConfig(**SHORT), GRID, PROMPT) if need.tabled and need.quantization == kind
    )
    plain, found = load_transformer(base), load_transformer(base, kind, sigmas=SIGMAS)
    spared = sum(parameter.nbytes for layer in modulation_layers(plain) for parameter in layer.parameters())
    assert real_bytes(found) == pytest.approx(need.transformer, rel=0 if kind == "none" else 0.02)
    assert real_bytes(found) <= real_bytes(plain) - spared
    rows = found.time_text_embed.rows
    assert rows.shape[0] == 3  # each sigma once
    untabled = memory_needs(base, TrainConfig(**SHORT), GRID, PROMPT)[0]
    dequantized = dequantized_bytes(plain.transformer_blocks, kind)  # a weight while it is used
    assert need.footprint.rest - untabled.footprint.rest == rows[0].nbytes + dequantized


def test_the_table_computes_at_full_precision_whatever_the_quantization(base):
    plain, quantized = (load_transformer(base, kind, SIGMAS) for kind in ("none", "nf4"))
    assert torch.equal(quantized.time_text_embed.rows, plain.time_text_embed.rows)


@pytest.mark.parametrize("options", [TOKEN, {"batch_size": 2, "caption_dropout": 0.5}])
def test_a_training_learns_the_same_with_a_table(base, dataset, tmp_path, options):
    config = TrainConfig(**SHORT | {"steps": 6, "report": True} | options)
    plain = train(dataset, config, tmp_path / "plain.zip", base)
    found = train(dataset, config, tmp_path / "tabled.zip", base, tabled)
    assert (plain.meta["modulations_tabled"], found.meta["modulations_tabled"]) == (False, True)
    assert any(line.startswith("Modulations: a table of 1000 sigmas, ") for line in found.log)
    assert not any("not sampled" in line for line in found.log)
    alone = config.batch_size == 1
    for name in [LORA_NAME, *([embedding_name("<zwx>")] if "placeholder_token" in options else [])]:
        expected, tensors = plain.tensors(name), found.tensors(name)
        for key, value in expected.items():
            assert torch.equal(value, tensors[key]) if alone else torch.allclose(value, tensors[key], rtol=0.05, atol=1e-3)
    if alone:
        assert found.meta["diagnostics"] == plain.meta["diagnostics"]


def test_in_bf16_the_table_has_every_sigma_that_sample_images_ask_for(base, dataset, tmp_path):
    config = TrainConfig(**SHORT | {"report": True, "resolution": (128,), "steps": 3} | TOKEN)
    run = train(dataset, config, tmp_path / "bf16.zip", replace(base, dtype=torch.bfloat16), tabled)
    assert not any("not sampled" in line for line in run.log)
    assert run.entry("report/grid.jpg")


def test_a_model_whose_modulations_depend_on_more_has_no_table(base):
    assert depend_on_timestep_alone(transformer_shell(base))
    editing = transformer_shell(base)
    editing.register_to_config(zero_cond_t=True)
    assert not depend_on_timestep_alone(editing)

"""Regional compilation: the same gradients, nothing compiled without gradients, a way back where compiling fails."""

from dataclasses import replace

import pytest
import torch
import torch._inductor.config
import torch._inductor.metrics
from torch._dynamo.utils import counters

from placeholder.config import TrainConfig
from placeholder.lora.adapter import add_lora, without_lora
from placeholder.model.quantization import quantize
from placeholder.training.losses import Denoiser
from placeholder.transformer import compile as compilation
from placeholder.transformer.checkpointing import BlockCheckpointing, saved_bytes
from placeholder.transformer.compile import RECOMPILE_LIMIT, CompiledBlocks, uncompiled
from placeholder.transformer.rotary import COMPLEX, real_rotations, rotate
from placeholder.weights.archive import LORA_NAME
from standin.small_base import Size, new_transformer
from tests.conftest import SHORT
from tests.support.samples import train, write_dataset


@pytest.fixture
def traced(monkeypatch):
    """What is compiled and how often, without the C++ code that inductor would make of it in a minute and more."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


class Passes:
    """Forward and backward passes of some small blocks with a LoRA that is not zero."""

    def __init__(self, blocks: int = 3):
        torch.manual_seed(0)
        self.transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=blocks, heads=2, vae_width=8))
        self.lora = add_lora(self.transformer.requires_grad_(False), 4, seed=0)
        with torch.no_grad():
            for parameter in self.lora:
                parameter.normal_(std=0.1)
        self.checkpointing = BlockCheckpointing(self.transformer, 0)
        self.denoiser = Denoiser(self.transformer)

    def made(self, batch: int, grid: tuple[int, int], text: int, learning: bool, checkpointed: int):
        """Loss, gradients (None where there is none; the inputs' last), and what the base model predicts.

        With `learning` inputs bring gradients to the first block too, so that it is compiled as the others are.
        """
        generator = torch.Generator().manual_seed(100 * batch + text)
        noisy = torch.randn(batch, grid[0] * grid[1], 64, generator=generator).requires_grad_(learning)
        embeds = torch.randn(batch, text, 32, generator=generator).requires_grad_(learning)
        inputs = noisy, torch.full((batch,), 0.5), embeds, grid
        self.checkpointing.checkpointed = checkpointed
        for parameter in self.lora:
            parameter.grad = None
        loss = self.denoiser(*inputs).square().mean()
        loss.backward()
        with torch.no_grad(), without_lora(self.transformer), uncompiled():
            base = self.denoiser(*inputs)
        return loss.detach(), [parameter.grad for parameter in self.lora] + [noisy.grad, embeds.grad], base


def alike(found, expected) -> None:
    """Losses, gradients and predictions of the base model as `Passes.made` gives them are the same but for rounding."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert torch.allclose(found[2], expected[2], atol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        assert other is None or torch.allclose(one, other, rtol=1e-3, atol=1e-5 * other.abs().max() + 1e-9)


@pytest.fixture(scope="module")
def passes() -> Passes:
    return Passes()


def test_real_rotations_turn_as_complex_ones_do():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    expected = COMPLEX(x, angles, use_real=False)
    assert torch.equal(rotate(x, angles, use_real=False), expected)
    (rotations,) = real_rotations((angles,))
    assert torch.allclose(rotate(x, rotations, use_real=False), expected, atol=1e-6)
    assert rotate(x.bfloat16(), rotations, use_real=False).dtype == torch.bfloat16


def test_compiled_blocks_give_the_gradients_of_uncompiled_ones(passes, traced):
    cases = [(2, (4, 4), 7, False, 0), (3, (3, 5), 9, False, 2), (4, (6, 6), 64, False, 3), (3, (4, 4), 16, True, 1)]
    expected = [passes.made(*case) for case in cases]
    before, warnings = counters["stats"]["unique_graphs"], []
    compiled = CompiledBlocks(passes.transformer, warnings.append)
    for case, made in zip(cases, expected, strict=True):
        alike(passes.made(*case), made)
    assert warnings == []
    assert 0 < counters["stats"]["unique_graphs"] - before <= RECOMPILE_LIMIT
    compiled.undo()
    torch.compiler.reset()
    again = passes.made(*cases[-1])
    assert all(one is other or torch.equal(one, other) for one, other in zip(again[1], expected[-1][1], strict=True))


def test_compiled_blocks_read_the_casts_of_the_present_pass(traced):
    """In bf16 the weights of the LoRA are cast once for all blocks, anew in each pass."""
    transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=2, heads=2, vae_width=8)).requires_grad_(False)
    lora, inputs = add_lora(transformer.bfloat16(), 4, seed=0), (torch.randn(1, 16, 64), torch.full((1,), 0.5))

    def passes() -> list[torch.Tensor]:
        found, generator = [], torch.Generator().manual_seed(1)
        for _ in range(3):
            with torch.no_grad():
                for parameter in lora:
                    parameter.normal_(std=0.1, generator=generator)
                    parameter.grad = None
            Denoiser(transformer)(*inputs, torch.ones(1, 7, 32), (4, 4)).float().square().mean().backward()
            found += [parameter.grad for parameter in lora if parameter.grad is not None]
        return found

    expected = passes()
    compiled = CompiledBlocks(transformer, pytest.fail)
    for gradient, wanted in zip(passes(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())
    compiled.undo()
    torch.compiler.reset()


def test_the_code_that_inductor_makes_gives_the_same():
    passes = Passes(blocks=1)
    case = 2, (4, 4), 7, True, 0
    expected, before = passes.made(*case), torch._inductor.metrics.generated_kernel_count
    compiled = CompiledBlocks(passes.transformer, pytest.fail)
    alike(passes.made(*case), expected)
    assert torch._inductor.metrics.generated_kernel_count > before
    compiled.undo()
    torch.compiler.reset()


def test_a_compiled_training_learns_what_an_uncompiled_one_learns(base, tmp_path, traced):
    dataset = write_dataset(tmp_path / "dataset.zip", ["a photo"])
    config = TrainConfig(**SHORT | {"steps": 3}, caption_dropout=0.0)
    plain = train(dataset, config, tmp_path / "plain.zip", base)
    before = counters["stats"]["unique_graphs"]
    run = train(dataset, replace(config, torch_compile=True), tmp_path / "compiled.zip", base)
    assert counters["stats"]["unique_graphs"] > before
    assert any(line.startswith("Compile: ") for line in run.log) and not any(line.startswith("Warning") for line in run.log)
    assert (plain.meta["torch_compile"], run.meta["torch_compile"]) == (False, True)
    assert run.meta["loss"] == pytest.approx(plain.meta["loss"], rel=1e-4)
    for name, value in plain.tensors(LORA_NAME).items():
        assert torch.allclose(value.float(), run.tensors(LORA_NAME)[name].float(), atol=2e-3)


def test_without_a_compiler_the_training_goes_on_uncompiled(base, dataset, baseline, tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        run = train(dataset, replace(baseline.config, torch_compile=True), tmp_path / "plain.zip", base)
    (warning,) = (line for line in run.log if line.startswith("Warning") and "compile" in line)
    assert "could not be compiled" in warning and "compiler" in warning and "\n" not in warning
    assert run.entry(LORA_NAME) == baseline.entry(LORA_NAME)


def test_an_error_that_is_not_the_compilers_is_not_taken_for_one(passes, traced):
    compiled = CompiledBlocks(passes.transformer, pytest.fail)
    assert not compiled.failed(RuntimeError("shapes do not fit"))
    compiled.undo()


def test_compiled_blocks_keep_no_more_than_the_plan_counts(traced):
    """It counts uncompiled blocks; the compiler would keep 8-bit weights dequantized."""
    transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=3, heads=2, vae_width=8)).requires_grad_(False)
    quantize(transformer.transformer_blocks, "int8", torch.device("cpu"))
    add_lora(transformer, 4, seed=0)
    BlockCheckpointing(transformer, 0)
    inputs = torch.randn(1, 256, 64), torch.full((1,), 0.5), torch.randn(1, 20, 32), (16, 16)

    def loss() -> torch.Tensor:
        return Denoiser(transformer)(*inputs).square().mean()

    before = saved_bytes(loss, transformer.parameters())
    compiled = CompiledBlocks(transformer, pytest.fail)
    loss().backward()
    assert saved_bytes(loss, transformer.parameters()) < before
    compiled.undo()
    torch.compiler.reset()

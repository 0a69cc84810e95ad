"""Compiled blocks: the same gradients, few compilations, a way back where compiling fails, and nothing left behind."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch._inductor.config
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from placeholder.config import TrainConfig
from placeholder.lora.adapter import add_lora, without_lora
from placeholder.model.quantization import quantize
from placeholder.service import launch
from placeholder.training.checkpoint import Checkpoint
from placeholder.training.losses import predict_velocity
from placeholder.training.resume import RECORDED, config_of
from placeholder.transformer import compile as compiling
from placeholder.transformer.attention import RealRotaryAttention, real_rotations, rotate
from placeholder.transformer.checkpointing import BlockCheckpointing, plain_calls, saved_bytes
from placeholder.transformer.compile import CACHE_VARIABLE, MAX_COMPILATIONS, PREFIX, compiled_blocks
from placeholder.transformer.modulations import tabulate
from placeholder.weights.archive import LORA_NAME
from standin.small_base import Size, new_transformer
from tests.conftest import SHORT
from tests.support.samples import train, write_dataset

MISSING = "no-such-compiler"


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """The compilers' output, so that these tests do not translate the same headers again."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("inductor")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


class Passes:
    """Forward and backward passes of three small blocks with a LoRA that is not zero."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=3, heads=2, vae_width=8))
        self.lora = add_lora(self.transformer.requires_grad_(False), 4, seed=0)
        with torch.no_grad():
            for parameter in self.lora:
                parameter.normal_(std=0.1)
        self.checkpointing = BlockCheckpointing(self.transformer, 0)

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
        loss = predict_velocity(self.transformer, *inputs).square().mean()
        loss.backward()
        with torch.no_grad(), without_lora(self.transformer):
            base = predict_velocity(self.transformer, *inputs)
        return loss.detach(), [parameter.grad for parameter in self.lora] + [noisy.grad, embeds.grad], base


@pytest.fixture(scope="module")
def passes() -> Passes:
    return Passes()


@pytest.fixture(scope="module")
def tabled_passes() -> Passes:
    """Those of a transformer whose modulations are a table."""
    found = Passes()
    tabulate(found.transformer, torch.tensor([0.5]), torch.device("cpu"))
    return found


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The temporary folder, empty at first; a compilation has to make its own folder there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())  # as PyTorch does when it is imported
    return folder


def test_real_rotations_turn_as_complex_ones_do():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    expected = apply_rotary_emb_qwen(x, angles, use_real=False)
    (rotations,) = real_rotations((angles,))
    assert torch.allclose(rotate(x, rotations), expected, atol=1e-6)
    assert rotate(x.bfloat16(), rotations).dtype == torch.bfloat16


def test_the_attention_is_that_of_diffusers(passes):
    attention = passes.transformer.transformer_blocks[1].attn
    frequencies = passes.transformer.pos_embed([[(1, 3, 4)]], max_txt_seq_len=5, device=torch.device("cpu"))
    inputs = torch.randn(2, 12, 64), torch.randn(2, 5, 64)
    stock = QwenDoubleStreamAttnProcessor2_0()(attention, *inputs, image_rotary_emb=frequencies)
    complex_ones = RealRotaryAttention()(attention, *inputs, image_rotary_emb=frequencies)
    real_ones = RealRotaryAttention()(attention, *inputs, image_rotary_emb=real_rotations(frequencies))
    for one, same, close in zip(stock, complex_ones, real_ones, strict=True):
        assert torch.equal(one, same)
        assert torch.allclose(one, close, atol=1e-6) and one.shape == close.shape


@pytest.mark.parametrize("of", ["passes", "tabled_passes"])
def test_compiled_blocks_give_the_gradients_of_uncompiled_ones_in_few_compilations(of, request, monkeypatch):
    """What is compiled and how often, without the C++ code that inductor would make of it in a minute and more."""
    passes = request.getfixturevalue(of)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, options, **given: whole(*args, **given, backend="aot_eager"))
    cases = [
        (2, (4, 4), 7, False, 0),
        (3, (3, 5), 9, False, 2),
        (4, (6, 6), 64, False, 3),
        (2, (2, 2), 4, False, 1),
        (3, (4, 4), 16, True, 1),
    ]
    if of == "tabled_passes":
        cases = cases[::4]  # the others differ in nothing that a table touches
    expected = [passes.made(*case) for case in cases]
    before = counters["stats"]["unique_graphs"]
    warnings: list[str] = []
    with compiled_blocks(passes.transformer, passes.checkpointing, False, warnings.append):
        for case, (loss, gradients, base) in zip(cases, expected, strict=True):
            found_loss, found_gradients, found_base = passes.made(*case)
            assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
            assert torch.equal(base, found_base)  # without gradients nothing is compiled
            for gradient, found in zip(gradients, found_gradients, strict=True):
                assert (gradient is None) == (found is None)
                assert gradient is None or torch.allclose(gradient, found, rtol=1e-3, atol=1e-5 * gradient.abs().max() + 1e-9)
    assert warnings == []
    # The first block where nothing before it learns, and the others: for all these shapes and batches.
    assert counters["stats"]["unique_graphs"] - before == 2 <= MAX_COMPILATIONS
    assert passes.checkpointing.calls is plain_calls
    assert type(passes.transformer.transformer_blocks[0].attn.processor) is QwenDoubleStreamAttnProcessor2_0
    again = passes.made(*cases[-1])
    assert all(one is other or torch.equal(one, other) for one, other in zip(again[1], expected[-1][1], strict=True))


def test_a_compiled_training_ends_in_a_proved_archive_and_leaves_nothing(base, tmp_path, temporary):
    dataset = write_dataset(tmp_path / "dataset.zip", ["a photo"])
    config = TrainConfig(**SHORT | {"steps": 3}, caption_dropout=0.0)
    plain = train(dataset, replace(config, torch_compile=False), tmp_path / "plain.zip", base)
    before, compilations = (psutil.Process().children(), dict(os.environ)), counters["stats"]["unique_graphs"]
    run = train(dataset, replace(config, torch_compile=True), tmp_path / "compiled.zip", base)
    assert psutil.Process().children() == before[0]
    changed = {name for name in os.environ | before[1] if os.environ.get(name) != before[1].get(name)}
    assert changed <= {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}  # an address in PyTorch, which inductor tells its own code
    assert list(temporary.iterdir()) == []
    assert counters["stats"]["unique_graphs"] - compilations == 2  # as many as the rule reckons with
    assert any(line.startswith("Weights archive proved") for line in run.log)
    assert any(line.startswith("Compile: the blocks are compiled") for line in run.log)
    assert run.meta["torch_compile"] is True and run.meta["compile_seconds"] > 0
    assert plain.meta["torch_compile"] is False and plain.meta["compile_seconds"] is None
    assert run.meta["loss"] == pytest.approx(plain.meta["loss"], rel=1e-4)
    for name, value in plain.tensors(LORA_NAME).items():
        assert torch.allclose(value.float(), run.tensors(LORA_NAME)[name].float(), atol=2e-3)


def test_without_a_compiler_the_training_goes_on_uncompiled(base, dataset, baseline, tmp_path, temporary):
    with torch._inductor.config.patch({"cpp.cxx": (None, MISSING)}):
        run = train(dataset, replace(baseline.config, torch_compile=True), tmp_path / "plain.zip", base)
    (warning,) = (line for line in run.log if line.startswith("Warning"))
    assert "the blocks could not be compiled" in warning and "compiler" in warning and "\n" not in warning
    assert run.entry(LORA_NAME) == baseline.entry(LORA_NAME)
    assert run.meta["compile_seconds"] is None
    assert list(temporary.iterdir()) == []


def test_short_trainings_are_not_compiled_by_rule(baseline):
    assert baseline.config.torch_compile is None and baseline.meta["torch_compile"] is False
    assert any(line.startswith("Compile: off, by rule") for line in baseline.log)


class CancelledError(BaseException):
    """What Cog raises is no Exception either."""


def test_cancelled_while_it_compiles_it_leaves_no_folder_and_no_compiler(passes, temporary):
    started: list[subprocess.Popen] = []

    def cancelled():
        with compiled_blocks(passes.transformer, passes.checkpointing, False, print):
            # As the driver of a compiler that was killed leaves the compiler proper running.
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            assert [found.name.startswith(PREFIX) for found in temporary.iterdir()] == [True]
            raise CancelledError

    with pytest.raises(CancelledError):
        cancelled()
    assert started[0].wait(5) != 0
    assert list(temporary.iterdir()) == [] and os.environ[CACHE_VARIABLE] == default_cache_dir()
    assert passes.checkpointing.calls is plain_calls


def test_memory_that_ran_out_is_not_taken_for_a_failure_to_compile(passes, monkeypatch):
    with compiled_blocks(passes.transformer, passes.checkpointing, False, pytest.fail) as compiled:

        def short_of_memory(*_):
            raise torch._dynamo.exc.InternalTorchDynamoError("inside") from torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(compiled, "_compiled", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            passes.made(2, (4, 4), 7, False, 0)
        assert not compiled.failed


def test_more_shapes_than_were_foreseen_go_on_uncompiled(passes, monkeypatch):
    case = (2, (4, 4), 7, False, 0)
    expected, warnings = passes.made(*case), []
    with compiled_blocks(passes.transformer, passes.checkpointing, False, warnings.append) as compiled:

        def one_too_many(*_):
            raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached\nand more")

        monkeypatch.setattr(compiled, "_compiled", one_too_many)
        found = passes.made(*case)
    assert torch.equal(found[0], expected[0]) and compiled.failed
    assert warnings == ["Warning: the blocks could not be compiled (recompile_limit reached): the training goes on without"]


@pytest.mark.parametrize("checkpointed", [0, 3])
def test_a_block_that_ran_compiled_is_recomputed_compiled_though_a_later_one_could_not_be(passes, monkeypatch, checkpointed):
    case = (2, (4, 4), 7, False, checkpointed)
    expected, warnings, calls = passes.made(*case), [], []
    with compiled_blocks(passes.transformer, passes.checkpointing, False, warnings.append) as compiled:

        def first_alone(block, *args):
            """As compiled code does, it keeps other tensors than the block does."""
            if block is not passes.transformer.transformer_blocks[0]:
                raise torch._dynamo.exc.InternalTorchDynamoError("the second one")
            calls.append(block)
            return tuple(part * torch.ones_like(part) * torch.ones(()) for part in compiling._block(block, *args))

        monkeypatch.setattr(compiled, "_compiled", first_alone)
        found = passes.made(*case)
    assert torch.allclose(found[0], expected[0]) and compiled.failed and len(warnings) == 1
    assert len(calls) == (2 if checkpointed else 1)


def test_a_resumed_training_decides_as_it_was_decided():
    config = TrainConfig(steps=10, seed=1)
    facts = {
        "config": {**vars(config), "resolution": list(config.resolution), "placeholder_token": [], "torch_compile": True},
        "step": 5,
        "record": dict.fromkeys(RECORDED, 0),
    }
    start = Checkpoint("checkpoint-5", {}, facts)
    assert config_of(start, replace(config, steps=20), {}).torch_compile is True
    with pytest.raises(ValueError, match="was made with torch_compile True, this training has False"):
        config_of(start, replace(config, torch_compile=False), {})


def test_processes_of_their_own_keep_what_they_compile_in_the_folder_of_their_job(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())
    script = f"import os; print(os.environ[{CACHE_VARIABLE!r}])"
    popen, log = subprocess.Popen, []
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda _arguments, **options: popen([sys.executable, "-c", script], **options)
    )
    assert launch._run(1, tmp_path / "job.json", log.append, {}) == 0
    assert [Path(line).parent for line in log] == [tmp_path]
    monkeypatch.setenv(CACHE_VARIABLE, "/kept")
    assert launch._run(1, tmp_path / "job.json", log.append, {}) == 0 and log[-1] == "/kept"


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_compiled_blocks_keep_no_more_than_the_plan_counts(quantization, monkeypatch):
    """It counts uncompiled blocks; the compiler would keep 8-bit weights unpacked."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, options, **given: whole(*args, **given, backend="aot_eager"))
    transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=3, heads=2, vae_width=8)).requires_grad_(False)
    quantize(transformer.transformer_blocks, quantization, torch.device("cpu"))
    add_lora(transformer, 4, seed=0)
    checkpointing = BlockCheckpointing(transformer, 0)
    inputs = torch.randn(1, 256, 64), torch.full((1,), 0.5), torch.randn(1, 20, 32), (16, 16)

    def loss() -> torch.Tensor:
        return predict_velocity(transformer, *inputs).square().mean()

    uncompiled = saved_bytes(loss, transformer.parameters())
    with compiled_blocks(transformer, checkpointing, True, pytest.fail):
        loss().backward()
        assert saved_bytes(loss, transformer.parameters()) < uncompiled

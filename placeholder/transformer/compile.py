"""Compiling the transformer's blocks for the steps of a training, with whatever that puts on the disk taken away again."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch import Tensor, nn

from placeholder.config import TrainConfig
from placeholder.training.examples import Example, Sample
from placeholder.training.flow import MIDDLE_SIGMA
from placeholder.training.loop import TrainState
from placeholder.training.losses import sample_losses
from placeholder.transformer.attention import RealRotaryAttention, real_rotations
from placeholder.transformer.checkpointing import BlockCheckpointing, plain_calls
from placeholder.transformer.payback import batch_sizes

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
PREFIX = "placeholder-compile-"
# Compilations of the blocks in one training: a batch of one and larger ones, for either a first block before which nothing
# learns, a first block after a text encoder whose rows learn, and the other blocks.
MAX_COMPILATIONS = 6
# Inductor's worker processes would outlive the training, and its precompiled headers lie in no folder that can be chosen; what it
# timed on a GPU could be otherwise next time.
OPTIONS = {
    "compile_threads": 1,
    "cpp_cache_precompile_headers": False,
    "deterministic": True,
    # Nothing about the blocks' modules changes for as long as they are compiled; to look them through in every call takes time.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}


class CompiledBlocks:
    """Runs the transformer's blocks compiled, in passes with gradients; all that a training does without them stays as it was.

    One compilation serves all blocks and all shapes: sizes are left open unless there is but `one_shape`, which is faster.
    Where compiling fails, `warn` gets a sentence and the blocks go on uncompiled.
    """

    def __init__(self, one_shape: bool, warn: Callable[[str], None]):
        self.one_shape = one_shape
        self.failed = False
        self._warn = warn
        self._frequencies: tuple[Tensor, Tensor] | None = None
        self._rotations: tuple = ()
        self._compiled = torch.compile(_block, fullgraph=True, dynamic=not one_shape, options=OPTIONS)

    def __call__(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What calls one block with the arguments that the transformer gives it: compiled again where it has been so before.

        A checkpointed block has to keep what it kept at first, also where compiling has failed for a later one.
        """
        compiled: list[bool] = []

        def call(block: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
            if not compiled:
                compiled.append(not self.failed)
            if not compiled[0]:
                return block(*args)
            found = self._call(block, *args)
            if found is None:
                compiled[0] = False
                return block(*args)
            return found

        return call

    def _call(self, block: nn.Module, *args: Any) -> tuple[Tensor, Tensor] | None:
        """What the compiled block returns; None where it could not be compiled."""
        hidden_states, encoder_hidden_states, _mask, temb, frequencies = args[:5]
        if frequencies is not self._frequencies:  # the same for all blocks of a pass
            self._frequencies, self._rotations = frequencies, real_rotations(frequencies)
        try:
            return self._compiled(block, hidden_states, encoder_hidden_states, temb, self._rotations)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        for cause in _causes(error):
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause
        self.failed = True
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self._warn(f"Warning: the blocks could not be compiled ({reason.strip()}): the training goes on without")


def _block(block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotations: tuple) -> Any:
    """What is compiled: a block without masks, and without what only models that edit pictures give it."""
    return block(hidden_states, encoder_hidden_states, None, temb, rotations)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def compiled_blocks(
    transformer: nn.Module, checkpointing: BlockCheckpointing, one_shape: bool, warn: Callable[[str], None]
) -> Iterator[CompiledBlocks]:
    """Let the blocks run compiled for a while; afterwards they, this process and its temporary folder are as before."""
    processors = [block.attn.processor for block in transformer.transformer_blocks]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in _unread(transformer)]
    with _cache_folder(), _settings(any(parameter.dtype == torch.int8 for parameter in transformer.parameters())):
        try:
            for block in transformer.transformer_blocks:
                block.attn.processor = RealRotaryAttention()
            checkpointing.calls = CompiledBlocks(one_shape, warn)
            yield checkpointing.calls
        finally:
            checkpointing.calls = plain_calls
            for hook in hooks:
                hook.remove()
            for block, processor in zip(transformer.transformer_blocks, processors, strict=True):
                block.attn.processor = processor
            torch.compiler.reset()


def _unread(transformer: nn.Module) -> list[nn.Parameter]:
    """What learns in the last block only for the text that it returns, which nothing reads.

    Compiled, these parameters would get gradients of zero instead of none, and weight decay with them.
    """
    layer = transformer.transformer_blocks[-1].attn.to_add_out
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def compiled_steps(
    train_state: TrainState,
    examples: list[Example],
    empty_ids: tuple[int, ...],
    config: TrainConfig,
    one_shape: bool,
    log: Callable[[str], None],
) -> Iterator[float]:
    """The blocks compiled, and ready, where `config.torch_compile` says so; yields the seconds that it took, 0 where it was not done."""
    if not config.torch_compile:
        yield 0.0
        return
    with compiled_blocks(train_state.transformer, train_state.checkpointing, one_shape, log) as compiled:
        start = time.monotonic()
        warm_up(train_state, examples, empty_ids, config, one_shape)
        seconds = 0.0 if compiled.failed else time.monotonic() - start
        if seconds:
            log(f"Compile: the blocks are compiled, in {seconds:.0f} s")
        yield seconds


def warm_up(
    train_state: TrainState, examples: list[Example], empty_ids: tuple[int, ...], config: TrainConfig, one_shape: bool
) -> None:
    """Make every kind of pass that is compiled apart once, before the first step; nothing of it is left but what was compiled.

    All blocks are checkpointed meanwhile, so that it takes less memory than a step does.
    """
    example = min(examples, key=lambda found: len(found.latents))
    kinds: dict[bool, tuple[int, ...]] = {}  # one prompt whose embeddings bring gradients to the rows, and one whose do not
    for ids in (example.input_ids, *example.preserved, *([empty_ids] if config.caption_dropout else [])):
        kinds.setdefault(train_state.prompt_embeds([ids]).requires_grad, ids)
    checkpointed, train_state.checkpointing.checkpointed = (
        train_state.checkpointing.checkpointed,
        train_state.checkpointing.blocks,
    )
    for size in batch_sizes(config, one_shape):
        for ids in kinds.values():
            sample = Sample(example, ids, torch.tensor(MIDDLE_SIGMA), 0)
            sample_losses(train_state.transformer, train_state.prompt_embeds, [sample] * size).sum().backward()
    train_state.checkpointing.checkpointed = checkpointed
    train_state.lora_optimizer.zero_grad(set_to_none=True)
    if train_state.row_optimizer is not None:
        train_state.row_optimizer.rows.grad = None


@contextmanager
def _settings(packed: bool) -> Iterator[None]:
    """Sizes that happen to be the same are not taken for one; a backward pass is compiled with its forward pass, so that it fails there.

    Where weights are `packed`, what a matrix product of the backward pass reads may be computed again: they would be kept unpacked.
    """
    with (
        torch.fx.experimental._config.patch(use_duck_shape=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS),
        torch._functorch.config.patch(ban_recompute_materialized_backward=not packed),
    ):
        yield


def chosen_cache() -> str | None:
    """The folder that the user has named in TORCHINDUCTOR_CACHE_DIR: PyTorch itself puts its default there when it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # imported where used: it takes seconds

    named = os.environ.get(CACHE_VARIABLE)
    return named if named and named != default_cache_dir() else None


@contextmanager
def _cache_folder() -> Iterator[None]:
    """A folder for what the compiler writes, for a while; the user's own TORCHINDUCTOR_CACHE_DIR is used and kept.

    A compiler that a cancellation has left running is ended: it is known by the TMPDIR that it was started with.
    """
    tempfile.gettempdir()  # remembered by Python, so that TMPDIR changes it for the compiler alone
    before = {name: os.environ.get(name) for name in (CACHE_VARIABLE, "TMPDIR")}
    kept = chosen_cache()
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=kept, ignore_cleanup_errors=True) as folder:
        try:
            os.environ.update({CACHE_VARIABLE: kept or folder, "TMPDIR": folder})
            from torch._inductor.utils import clear_caches  # imported where used: it takes seconds

            clear_caches()
            try:
                yield
            finally:
                clear_caches()  # they name files in the folder
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            _end_compilers(folder)


def _end_compilers(folder: str) -> None:
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == folder:
                process.kill()
        except psutil.Error:  # it has ended, or is another user's
            continue

"""Regional compilation of the transformer's blocks, by diffusers' compile_repeated_blocks, in the steps of a training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch import Tensor, nn

from placeholder.errors import Log
from placeholder.transformer.layers import Int8Linear
from placeholder.transformer.rotary import real_rotations

# Of the blocks' code in one training: batches of one and of several images and first blocks with and without a gradient at
# their input, each with sizes fixed and then open. PyTorch's default is 8.
RECOMPILE_LIMIT = 16
BACKEND = "inductor"
OPTIONS = {
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
}  # nothing in the blocks changes while they are compiled
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def uncompiled() -> AbstractContextManager[None]:
    """Passes without gradients run uncompiled: with the LoRA off, or of other sizes, they would be compiled once more each."""
    return torch.compiler.set_stance("force_eager")


class CompiledBlocks:
    """A transformer whose blocks compile when they first run; they go on uncompiled where that fails."""

    def __init__(self, transformer: nn.Module, log: Log):
        self.transformer, self.log, self._undo = transformer, log, ExitStack()
        for setting in _settings(any(isinstance(module, Int8Linear) for module in transformer.modules())):
            self._undo.enter_context(setting)
        # Nothing reads the last block's output for the text. Compiled, its LoRA would get gradients of zero instead of none,
        # and weight decay with them.
        unread = [p for p in transformer.transformer_blocks[-1].attn.to_add_out.parameters() if p.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in unread]
        hooks.append(transformer.pos_embed.register_forward_hook(lambda _module, _args, found: real_rotations(found)))
        for hook in hooks:
            self._undo.callback(hook.remove)
        options = OPTIONS | ({"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {})
        transformer.compile_repeated_blocks(fullgraph=True, backend=BACKEND, options=options)

    def failed(self, error: RuntimeError) -> bool:
        """Whether `error` comes from the compiler; the blocks are uncompiled then, and the log has a warning."""
        if not isinstance(error, COMPILER_ERRORS):
            return False
        self.undo()
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.log(f"Warning: the transformer's blocks could not be compiled ({reason.strip()}): the training goes on without")
        return True

    def undo(self) -> None:
        """The transformer and PyTorch's settings as they were."""
        self._undo.close()
        for block in self.transformer.transformer_blocks:
            block._compiled_call_impl = None


def _settings(int8: bool) -> Iterator[AbstractContextManager]:
    """What is set while blocks are compiled."""
    yield torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)
    yield torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that happen to be equal need not stay so
    if int8:
        # What a matrix product of the backward pass reads may be computed again: quantized weights would be kept dequantized.
        yield torch._functorch.config.patch(ban_recompute_materialized_backward=False)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def compiled_blocks(transformer: nn.Module, wanted: bool, log: Log) -> Iterator[CompiledBlocks | None]:
    """The blocks compiled for a while, where that is wanted."""
    if not wanted:
        yield None
        return
    compiled = CompiledBlocks(transformer, log)
    log("Compile: the transformer's blocks compile in the first steps, which takes minutes")
    try:
        yield compiled
    finally:
        compiled.undo()
        torch.compiler.reset()

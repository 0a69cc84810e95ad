"""The token gate: a LoRA acts in those passes of the transformer whose prompt names one of its tokens, and in no other."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from placeholder.lora.adapter import ADAPTER
from placeholder.transformer.layers import FusedLoraAddition, fuse_lora_addition

PROMPTS_KEPT = 4096  # of which the gate knows what they name, by digest


class TokenGate:
    """Decides for each pass of a transformer, by the prompt embeddings that it is given, which adapters act.

    Prompt embeddings are recognized by their content, whichever way they take from the text encoder to the transformer. For
    prompts that the gate does not know, and for all while it is not `on`, every adapter acts.
    """

    def __init__(self, transformer: nn.Module):
        self.on = True
        self.acting: dict[str, list[int]] = {}  # by adapter: the samples of the present pass in which it acts; absent: all
        self._idle: dict[bytes, frozenset[str]] = {}
        self._decided = WeakIdKeyDictionary()  # each step of a generation has the same tensors
        self._hook = transformer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def install(self, transformer: nn.Module, adapter: str, fused: bool) -> None:
        """Let the gate decide about an adapter without dropout; `fused`: it is added as by FusedLoraAddition."""
        for module in transformer.modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_A:
                module.lora_variant[adapter] = GatedAddition(self, fused)

    def remember(self, prompt_embeds: Tensor, idle: Collection[str]) -> None:
        """The adapters that do not act for these prompt embeddings, (T, D) as the transformer gets them."""
        digest = _digest(prompt_embeds)
        self._idle.pop(digest, None)
        self._idle[digest] = frozenset(idle)
        if len(self._idle) > PROMPTS_KEPT:
            del self._idle[next(iter(self._idle))]  # what was remembered the longest ago
        self._decided.clear()

    def remove(self) -> None:
        """Take the gate off its transformer; every adapter acts again."""
        self._hook.remove()
        self.acting = {}

    def _enter(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a pass: find the samples in which each adapter acts."""
        embeds = kwargs["encoder_hidden_states"]  # (B, T, D)
        if not self.on:
            self.acting = {}
            return
        if embeds not in self._decided:
            idle = [self._idle.get(_digest(sample), frozenset()) for sample in embeds]
            self._decided[embeds] = {
                adapter: [number for number, names in enumerate(idle) if adapter not in names]
                for adapter in frozenset().union(*idle)
            }
        self.acting = self._decided[embeds]


@contextmanager
def gated(transformer: nn.Module) -> Iterator[TokenGate]:
    """A gate on the LoRA of a training, for sampling; afterwards it is trained as before."""
    gate = TokenGate(transformer)
    gate.install(transformer, ADAPTER, fused=True)
    try:
        yield gate
    finally:
        gate.remove()
        fuse_lora_addition(transformer, ADAPTER)


def _digest(prompt_embeds: Tensor) -> bytes:
    """The SHA-256 of prompt embeddings (T, D) without the zeros that pad them in a batch."""
    rows = prompt_embeds.detach().float().cpu().numpy()
    return hashlib.sha256(rows[: rows.any(axis=1).nonzero()[0].max(initial=-1) + 1].tobytes()).digest()


class GatedAddition(LoraVariant):
    """Adds a LoRA's output to the base layer's for the samples in which it acts; the others stay as they are, bit for bit."""

    def __init__(self, gate: TokenGate, fused: bool):
        self.gate, self.fused = gate, fused

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """`result`, the base layer's output (B, ..., O) for x (B, ..., I), with scale * B A x added where the LoRA acts."""
        acting = self.gate.acting.get(active_adapter)
        if acting is None or len(acting) == len(x):
            return self._added(module, active_adapter, x, result)
        if not acting:
            return result
        added = self._added(module, active_adapter, x[acting], result[acting])
        return result.index_copy(0, torch.tensor(acting, device=x.device), added.to(result.dtype))

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Raise ValueError, since what is merged into the weights acts for every prompt."""
        raise ValueError("a LoRA with a token gate cannot be fused: load it again, with token_gate=False if it is to be fused")

    merge_safe = merge_unsafe

    def _added(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        if self.fused:
            return FusedLoraAddition.forward(module, adapter, x, result)
        return result + module.lora_B[adapter](module.lora_A[adapter](x)) * module.scaling[adapter]

"""Weights archives on a transformer: applied, switched and removed so that nothing of one is seen after it."""

from collections import OrderedDict
from pathlib import Path

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.errors import Log, shown
from placeholder.lora.adapter import ADAPTER, EXTRA_ADAPTER, FAST_ADAPTER, load_lora, overwrite_lora
from placeholder.lora.gate import TokenGate
from placeholder.model.base import BaseModel
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.vocabulary import archive_tokens, check_tokens
from placeholder.transformer.layers import fuse_lora_addition
from placeholder.weights.archive import Weights, content_digest, read_weights

Applied = tuple[tuple[str, str, tuple[str, ...]], ...]  # adapters, the digests of their archives, and their tokens' other names
INCOMPLETE: Applied = (("incomplete", "", ()),)
ARCHIVES_KEPT = 4  # read and checked, in the host's memory; one of rank 32 takes 0.2 GB


class AppliedWeights:
    """The LoRAs and tokens of one archive, one and an extra one, or none; and the step-distilled LoRA of go_fast.

    `applied` says which archives are on the transformer; `tokens` are the placeholder tokens of all of them. While the
    transformer changes, `applied` is INCOMPLETE, so that the next call undoes an interruption at any moment.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        base: BaseModel,
        log: Log,
    ):
        self.transformer, self.tokenizer, self.width = transformer, tokenizer, width
        self.base, self.log = base, log
        self.gate = TokenGate(transformer)
        self.archives: OrderedDict[str, Weights] = OrderedDict()  # by digest, the least recently used first
        self._reset()

    def apply(
        self,
        path: Path | None,
        extra: Path | None = None,
        fast: dict[str, Tensor] | None = None,
        extra_names: tuple[str, ...] = (),
    ) -> None:
        """Apply an archive, and an extra one, unless those applied have the same content; nothing of earlier ones remains.

        `extra_names` are other names for the tokens of the extra one, in their order; empty: as they were trained.
        The step-distilled LoRA `fast` is added to them. It stays, inactive, until the archives' layers change or no archive is
        asked for. Raises ValueError for weights that cannot be used.
        """
        if extra_names and not extra:
            raise ValueError("extra_placeholder_token renames the token of extra_lora_weights, which are not given")
        paths = {adapter: given for adapter, given in ((ADAPTER, path), (EXTRA_ADAPTER, extra)) if given}
        if not paths and not fast:
            self.remove()
            return
        names = {EXTRA_ADAPTER: extra_names}
        wanted = tuple((adapter, content_digest(given), names.get(adapter, ())) for adapter, given in paths.items())
        if wanted != self.applied:
            self._switch(paths, wanted)
        if fast and not self.has_fast:
            self.applied = INCOMPLETE
            self._add(fast, FAST_ADAPTER)
            self.has_fast = True
            self.applied = wanted

    def remove(self) -> None:
        """Back to the base model alone, bit for bit."""
        if not self.applied and not self.has_fast:
            return
        self.applied = INCOMPLETE
        self.transformer.unload_lora()
        self._reset()

    def scale(self, scale: float, extra_scale: float, fast: bool) -> None:
        """Set the strengths of the archives' LoRAs, and whether the step-distilled LoRA is active."""
        scales = {ADAPTER: scale, EXTRA_ADAPTER: extra_scale}
        active = {adapter: scales[adapter] for adapter, *_ in self.applied} | ({FAST_ADAPTER: 1.0} if fast else {})
        if active:
            self.transformer.set_adapters(list(active), weights=list(active.values()))  # others are disabled

    def unnamed(self, named: set[str]) -> dict[str, str]:
        """The adapters of the archives none of whose tokens is among those that a prompt names, with their tokens in words."""
        parts = zip(self.applied, self.names, strict=True)
        return {adapter: " or ".join(names) for (adapter, *_), names in parts if names and not named.intersection(names)}

    def _reset(self) -> None:
        self.tokens, self.names, self.has_fast = self._tokens([]), [], False
        self.applied: Applied = ()  # last: an interruption before leaves INCOMPLETE

    def _switch(self, paths: dict[str, Path], wanted: Applied) -> None:
        parts = [self._read(paths[adapter], digest).renamed(names) for adapter, digest, names in wanted]
        tokens = self._tokens(parts)
        if not self._overwrite(wanted, parts):
            self.remove()
            self.applied = INCOMPLETE
            for adapter, part in zip(paths, parts, strict=True):
                self._add(part.lora, adapter)
        self.tokens, self.names = tokens, [tuple(part.embeddings) for part in parts]
        self.applied = wanted
        for line in tokens.registered():
            self.log(line)
        for warning in (warning for part in parts for warning in part.warnings()):
            self.log(f"Warning: {warning}")
        for adapter, part in zip(paths, parts, strict=True):
            name = "Weights" if adapter == ADAPTER else "Extra weights"
            self.log(f"{name} applied: {len(part.lora)} LoRA tensors, {len(part.embeddings)} embeddings")

    def _read(self, path: Path, digest: str) -> Weights:
        """The archive, from memory where one of the same content was read lately."""
        weights = self.archives.pop(digest, None) or read_weights(path)
        self.archives[digest] = weights
        while len(self.archives) > ARCHIVES_KEPT:
            self.archives.popitem(last=False)
        return weights

    def _tokens(self, parts: list[Weights]) -> PlaceholderTokens:
        """The archives' tokens, with the ids after this tokenizer's last: the first archive's as in training, then the extra's.

        The ids that an archive records prove that it was trained on this vocabulary.
        """
        embeddings: dict[str, Tensor] = {}
        for part in parts:
            archive_tokens(part.embeddings, part.meta.get("placeholder_token_ids", {}), self.tokenizer, self.width)
            if shared := sorted(embeddings.keys() & part.embeddings.keys()):
                raise ValueError(
                    f"replicate_weights and extra_lora_weights both use the token {shared[0]!r}: give extra_placeholder_token, "
                    "another name for that of extra_lora_weights, such as <second>"
                )
            for name, here in (("base_model", self.base.source), ("base_model_revision", self.base.commit)):
                if (trained_on := part.meta.get(name, here)) != here:
                    self.log(f"Warning: trained on {name} {shown(trained_on)}, applied to {here}")
            embeddings |= part.embeddings
        check_tokens(tuple(embeddings), self.tokenizer)  # those of one archive may overlap with those of the other
        return PlaceholderTokens(len(self.tokenizer), embeddings, self.width).to(self.base.device)

    def _overwrite(self, wanted: Applied, parts: list[Weights]) -> bool:
        """Copy the one LoRA that is wanted into the layers of the one that is applied, if these are the same layers."""
        if [adapter for adapter, *_ in self.applied] != [adapter for adapter, *_ in wanted] or len(parts) > 1:
            return False
        before, self.applied = self.applied, INCOMPLETE
        if overwrite_lora(self.transformer, parts[0].lora):
            return True
        self.applied = before
        return False

    def _add(self, lora: dict[str, Tensor], adapter: str) -> None:
        load_lora(self.transformer, lora, adapter)
        for module in self.transformer.modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_A:
                # PEFT puts them beside the layer's weight, which is in host memory where blocks are offloaded.
                module.lora_A[adapter].to(self.base.device)
                module.lora_B[adapter].to(self.base.device)
        if adapter == FAST_ADAPTER:
            fuse_lora_addition(self.transformer, adapter)
        else:
            self.gate.install(self.transformer, adapter, fused=True)

"""A weights archive on a stock QwenImagePipeline of diffusers: its LoRA and its tokens, loaded and unloaded."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from placeholder.errors import quoted
from placeholder.lora.adapter import ADAPTER, load_lora
from placeholder.lora.gate import TokenGate
from placeholder.model.base import QWEN_IMAGE
from placeholder.model.download import local_file
from placeholder.options import checked
from placeholder.request import Request
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import tokenized
from placeholder.tokens.vocabulary import archive_tokens
from placeholder.weights.archive import Weights, read_weights

WRAPPED = "_get_qwen_prompt_embeds"  # the private method by which the pipeline encodes prompts; wrapped here alone


class LoadedArchive:
    """An archive on one pipeline; replaces the pipeline's `_get_qwen_prompt_embeds`.

    A prompt that names a token is encoded alone, without padding, as in training; all others are encoded by the pipeline.
    With `gated` the LoRA acts for the former alone.
    """

    def __init__(self, pipe: QwenImagePipeline, weights: Weights, tokens: PlaceholderTokens, lora_scale: float, gated: bool):
        self.pipe, self.weights, self.tokens, self.lora_scale = pipe, weights, tokens.requires_grad_(False), lora_scale
        self.gated = gated and bool(weights.embeddings)
        self.gate: TokenGate | None = None

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (B, T, D), padded with zeros, and their mask (B, T)."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        names = [any(token in text for token in self.tokens.ids) for text in prompts]
        if any(names):
            device, dtype = device or self.pipe._execution_device, dtype or self.pipe.text_encoder.dtype
            found = [
                self._encode(text, device) if named else self._stock([text], device, dtype)[0][0]
                for text, named in zip(prompts, names, strict=True)
            ]  # B times (T, D)
            embeds = nn.utils.rnn.pad_sequence([each.to(device, dtype) for each in found], batch_first=True)
            masks = [torch.ones(len(each), dtype=torch.long, device=device) for each in found]
            mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)
        else:
            embeds, mask = self._stock(prompts, device, dtype)
        if self.gate:
            for text, sample in zip(prompts, embeds, strict=True):
                named = self.tokens.named(tokenized(self.pipe.tokenizer, self.tokens, text).ids)
                for kept in (sample, sample[: QWEN_IMAGE.max_prompt_tokens]):  # which the pipeline cuts it to by default
                    self.gate.remember(kept, () if named else (ADAPTER,))
        return embeds, mask

    def _stock(self, prompts: list[str], device: torch.device | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        return getattr(type(self.pipe), WRAPPED)(self.pipe, prompts, device, dtype)

    def _encode(self, prompt: str, device: torch.device) -> Tensor:
        """The embeddings (T, D) of one prompt, by the pipeline's whole text encoder, which has the hooks of offloading."""
        text_encoder, found = self.pipe.text_encoder, tokenized(self.pipe.tokenizer, self.tokens, prompt)
        if found.left_out:
            warnings.warn(f"of the prompt {quoted(prompt)} {found.cut(self.tokens)}", stacklevel=2)
        input_ids = torch.tensor([found.ids], device=device)  # (1, T)
        with learned_rows(text_encoder.get_input_embeddings(), self.tokens):
            encoded = text_encoder(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), output_hidden_states=True, use_cache=False
            )
        return encoded.hidden_states[-1][0, self.pipe.prompt_template_encode_start_idx :]


@contextmanager
def learned_rows(embed_tokens: nn.Embedding, tokens: PlaceholderTokens) -> Iterator[None]:
    """While this lasts, the embedding returns the learned rows at their ids; its matrix is neither resized nor changed."""
    given: list[Tensor] = []

    def without_new_ids(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        given[:] = args
        return (args[0].masked_fill(args[0] >= tokens.first_id, 0),)

    def with_rows(_module: nn.Module, _args: tuple[Tensor], vocabulary: Tensor) -> Tensor:
        tokens.to(vocabulary.device)  # where offloading has brought the embedding
        return tokens.embed(lambda _ids: vocabulary, given[0].to(vocabulary.device))

    hooks = [embed_tokens.register_forward_pre_hook(without_new_ids), embed_tokens.register_forward_hook(with_rows)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load(pipe: QwenImagePipeline, weights: Path | str, lora_scale: float = 1.0, token_gate: bool = True) -> None:
    """Load a weights archive, or a bare LoRA in safetensors, into the pipeline; it replaces one that was loaded before.

    With `token_gate` the LoRA of an archive with tokens acts for prompts that name one of them; without, for every prompt.
    `weights` is a path or a URL. Afterwards `pipe(prompt="a photo of <zwx>")` generates images of the trained subject. Raises
    ValueError for weights that cannot be used; the pipeline then stays as it was.
    """
    earlier = _loaded(pipe)
    _check(pipe, earlier)
    lora_scale = checked(Request, {"prompt": "", "lora_scale": lora_scale}).lora_scale
    with local_file(str(weights)) as path:
        found = read_weights(path)
    width = pipe.text_encoder.get_input_embeddings().embedding_dim
    tokens = archive_tokens(found.embeddings, found.meta.get("placeholder_token_ids", {}), pipe.tokenizer, width)
    trained_on, here = found.meta.get("base_model"), pipe.name_or_path
    if trained_on and here and trained_on != here:
        warnings.warn(f"trained on {trained_on}, applied to {here}", stacklevel=2)
    for warning in found.warnings():
        warnings.warn(warning, stacklevel=2)
    unload(pipe)
    try:
        _apply(pipe, LoadedArchive(pipe, found, tokens, lora_scale, token_gate))
    except BaseException:
        pipe.transformer.unload_lora()
        if earlier is not None:
            _apply(pipe, earlier)
        raise


def unload(pipe: QwenImagePipeline) -> None:
    """Undo `load`; the pipeline is what it was before, bit for bit. Does nothing if nothing was loaded.

    Raises ValueError for a LoRA that was fused since.
    """
    loaded = _loaded(pipe)
    if loaded is None:
        return
    if any(module.merged for module in pipe.transformer.modules() if isinstance(module, LoraLayer)):
        raise ValueError("the LoRA is fused into the weights: pipe.unfuse_lora() first, which takes it out up to rounding")
    if loaded.gate:
        loaded.gate.remove()
    if set(_adapters(pipe)) - {ADAPTER}:
        pipe.transformer.delete_adapters(ADAPTER)  # another LoRA was loaded after it and stays
    else:
        pipe.transformer.unload_lora()
    delattr(pipe, WRAPPED)


def _apply(pipe: QwenImagePipeline, archive: LoadedArchive) -> None:
    load_lora(pipe.transformer, archive.weights.lora)
    pipe.transformer.set_adapters(ADAPTER, weights=archive.lora_scale)
    if archive.gated:
        archive.gate = TokenGate(pipe.transformer)
        archive.gate.install(pipe.transformer, ADAPTER, fused=False)
    setattr(pipe, WRAPPED, archive)


def _loaded(pipe: QwenImagePipeline) -> LoadedArchive | None:
    return vars(pipe).get(WRAPPED)


def _adapters(pipe: QwenImagePipeline) -> list[str]:
    return list(getattr(pipe.transformer, "peft_config", {}))


def _check(pipe: QwenImagePipeline, earlier: LoadedArchive | None) -> None:
    if not isinstance(pipe, QwenImagePipeline):
        raise ValueError(f"the pipeline is a {type(pipe).__name__}: give a QwenImagePipeline")
    missing = [name for name in ("tokenizer", "text_encoder", "transformer") if getattr(pipe, name) is None]
    if missing:
        raise ValueError(f"the pipeline has no {missing[0]}: load it with all its components")
    if hasattr(pipe.transformer, "_orig_mod"):
        raise ValueError("torch.compile has wrapped the transformer: load first, or compile with pipe.transformer.compile()")
    if any(parameter.is_meta for parameter in pipe.transformer.parameters()):
        raise ValueError(
            "the pipeline's weights are offloaded one by one: pipe.enable_model_cpu_offload() or pipe.enable_group_offload() "
            "instead of enable_sequential_cpu_offload()"
        )
    others = [name for name in _adapters(pipe) if earlier is None or name != ADAPTER]
    if others:
        raise ValueError(
            f"the pipeline already has the LoRA {others[0]!r}: remove it with pipe.unload_lora_weights(), "
            "load these weights, and then the other again"
        )

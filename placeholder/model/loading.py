"""Loading the base model's components: frozen and on the device, quantized or offloaded; and their shapes without weights."""

import gc
from functools import lru_cache

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.modeling_utils import local_torch_dtype

from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.offloading import stream
from placeholder.model.quantization import Quantization, quantize, quantized_bytes
from placeholder.model.vae import as_single_frame
from placeholder.transformer.modulations import modulation_layers, tabulate


@lru_cache(maxsize=2)
def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer alone; no weights are read. It takes a second and nothing changes it, so that its users share it."""
    collecting = gc.isenabled()
    gc.disable()  # it would look through the growing vocabulary over and over, for half of the time
    try:
        return base.component(QWEN_IMAGE.tokenizer, "tokenizer")
    finally:
        if collecting:
            gc.enable()


def load_scheduler(base: BaseModel) -> FlowMatchEulerDiscreteScheduler:
    """The sampling schedule, whose configuration also holds the constants of the resolution shift."""
    return base.component(QWEN_IMAGE.scheduler, "scheduler")


def shift_constants(base: BaseModel) -> tuple[int, int, float, float]:
    """The arguments of diffusers' `calculate_shift` after the number of tokens; Qwen-Image: 0.5 at 256 tokens, 0.9 at 8192."""
    config = load_scheduler(base).config
    return config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift


def load_vae(base: BaseModel, dtype: torch.dtype) -> nn.Module:
    """The VAE for single images, frozen."""
    vae = as_single_frame(base.component(QWEN_IMAGE.vae, "vae", dtype=dtype, use_safetensors=True))
    return vae.requires_grad_(False).eval().to(base.device)


def load_text_encoder(base: BaseModel, quantization: Quantization = "none", offloaded: int = 0) -> nn.Module:
    """The language model inside Qwen2.5-VL, frozen: without the vision tower and the head that computes logits.

    The embedding matrix stays in host memory, where ids are looked up. So do the last `offloaded` layers, each of which is on
    the device while it computes.
    """
    vlm = base.component(QWEN_IMAGE.text_encoder, "text_encoder", dtype=base.dtype, use_safetensors=True)
    text_encoder = vlm.model.language_model.requires_grad_(False).eval()
    quantize(text_encoder.layers, quantization, base.device)
    text_encoder.embed_tokens.cpu()
    text_encoder.norm.to(base.device)
    text_encoder.rotary_emb.to(base.device)
    _place(text_encoder.layers, offloaded, base.device)
    return text_encoder


def _place(layers: nn.ModuleList, offloaded: int, device: torch.device) -> None:
    kept = len(layers) - offloaded
    layers[:kept].to(device)
    stream(layers[kept:], device)


def text_encoder_bytes(base: BaseModel, quantization: Quantization = "none", offloaded: int = 0) -> int:
    """Bytes that the text encoder of `load_text_encoder` has on the device: of `offloaded` layers one, while it computes."""
    shell = text_encoder_shell(base)
    embedding = 0 if base.device.type == "cpu" else shell.embed_tokens.weight.nbytes
    elsewhere = [parameter for layer in shell.layers[: max(0, offloaded - 1)] for parameter in layer.parameters()]
    return quantized_bytes(shell, shell.layers, quantization) - embedding - sum(parameter.nbytes for parameter in elsewhere)


def load_transformer(
    base: BaseModel, quantization: Quantization = "none", sigmas: Tensor | None = None, offloaded: int = 0
) -> nn.Module:
    """The denoising transformer, frozen. Its last `offloaded` blocks are in host memory, as those layers.

    With `sigmas` (N,) its modulations are a table for these in host memory, computed from unquantized weights.
    """
    transformer = base.component(QWEN_IMAGE.transformer, "transformer", dtype=base.dtype, use_safetensors=True)
    if sigmas is not None:
        tabulate(transformer, sigmas, base.device)
    quantize(transformer.transformer_blocks, quantization, base.device)
    transformer.requires_grad_(False).eval()
    for name, part in transformer.named_children():
        if name != "transformer_blocks":
            part.to(base.device)
    _place(transformer.transformer_blocks, offloaded, base.device)
    return transformer


def transformer_bytes(shell: nn.Module, quantization: Quantization, tabled: bool) -> int:
    """Bytes that the transformer of `load_transformer` has on the device, from its `transformer_shell`."""
    whole = quantized_bytes(shell, shell.transformer_blocks, quantization)
    if not tabled:
        return whole
    modulations = sum(quantized_bytes(layer, layer, quantization) for layer in modulation_layers(shell))
    return whole - modulations - quantized_bytes(shell.time_text_embed, shell.time_text_embed, "none")


def transformer_shell(base: BaseModel) -> nn.Module:
    """The transformer's shapes and dtype on the meta device: no weights are read."""
    config = base.configuration(QWEN_IMAGE.transformer, "transformer")
    with torch.device("meta"), local_torch_dtype(base.dtype):
        return QWEN_IMAGE.transformer.from_config(config).requires_grad_(False)


def text_encoder_shell(base: BaseModel) -> nn.Module:
    """The text encoder's shapes and dtype on the meta device: no weights are read."""
    config = base.configuration(QWEN_IMAGE.text_encoder, "text_encoder")
    with torch.device("meta"), local_torch_dtype(base.dtype):
        return AutoModel.from_config(config.text_config).requires_grad_(False)


def text_width(base: BaseModel) -> int:
    """The width D of the text encoder's embeddings, from its configuration."""
    return base.configuration(QWEN_IMAGE.text_encoder, "text_encoder").text_config.hidden_size

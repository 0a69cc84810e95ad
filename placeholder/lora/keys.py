"""How trainers of Qwen-Image name the weights of a LoRA: prefix, layer and ending of each key (docs/formats.md)."""

import re

from placeholder.errors import quoted
from placeholder.lora.adapter import PREFIX, A, B

# Before the layer's name, with the program that writes it; after the flat ones the dots of the name are underscores.
FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")  # kohya and musubi-tuner, LyCORIS, OneTrainer
PREFIXES = (PREFIX, "diffusion_model.", "pipe.dit.", "base_model.model.", *FLAT_PREFIXES)  # a key with none of them is bare
ALPHA = ".alpha"
ENDINGS = {  # how a key ends: the name of the convention, and how ours ends
    A: ("lora_A", A),
    B: ("lora_A", B),
    ".lora_A.default.weight": ("lora_A.default", A),
    ".lora_B.default.weight": ("lora_A.default", B),
    ".lora_down.weight": ("lora_down", A),
    ".lora_up.weight": ("lora_down", B),
    ".lora.down.weight": ("lora.down", A),
    ".lora.up.weight": ("lora.down", B),
}
BIASES = (".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias", ".lora.up.bias", ".diff_b")  # read where they are zero
OTHER_METHODS = {  # what the keys of other methods hold
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lora_mid": "LoRA with a Tucker core",
    r"\.oft_|\.boft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.on_input$|\.ia3_l$": "IA3",
    r"\.diff$": "full-rank difference",
    r"\.w_norm$|\.b_norm$": "difference of norms",
}
TEXT_ENCODERS = ("lora_te", "text_encoder")
# Every linear layer of diffusers' QwenImageTransformer2DModel: at its top, and in each of its blocks.
TOP_LAYERS = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
BLOCK_LAYERS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
)
DOTTED_TOP = {layer.replace(".", "_"): layer for layer in TOP_LAYERS}
DOTTED_BLOCK = {layer.replace(".", "_"): layer for layer in BLOCK_LAYERS}
FLAT_BLOCK = re.compile(r"transformer_blocks_([0-9]+)_(\w+)")


def check_method(name: str, key: str) -> None:
    """ValueError for a key of another method than plain LoRA, and for one of a text encoder."""
    for sign, method in OTHER_METHODS.items():
        if re.search(sign, key):
            raise ValueError(f"{name} is of the kind {method} ({quoted(key)}): only plain LoRA can be loaded")
    if key.startswith(TEXT_ENCODERS):
        raise ValueError(f"{name} changes the text encoder ({quoted(key)}): only a LoRA of the transformer alone can be loaded")


def split_key(name: str, key: str) -> tuple[str, str, str]:
    """The key's prefix, the name of its layer in diffusers, and its ending."""
    ending = next((ending for ending in (*ENDINGS, ALPHA) if key.endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{name} holds {quoted(key)}, which is no weight of a LoRA: expected names that end in {A} or {B}")
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    module = key[len(prefix) : -len(ending)]
    if prefix in FLAT_PREFIXES:
        return prefix, _dotted(name, module), ending
    if not prefix and (inner := re.search(r"\.(transformer_blocks\.[0-9]+\..+)", module)) and inner[1].endswith(BLOCK_LAYERS):
        unknown, known = module[: inner.start(1)], ", ".join(PREFIXES)
        raise ValueError(
            f"{name} has an unknown prefix {quoted(unknown)} before {quoted(inner[1])}: known are {known} and none"
        )
    return prefix, module, ending


def _dotted(name: str, flat: str) -> str:
    """The layer's name with its dots, of which only those of the known layers can be told from underscores."""
    block = FLAT_BLOCK.fullmatch(flat)
    if flat in DOTTED_TOP:
        return DOTTED_TOP[flat]
    if block is None or block[2] not in DOTTED_BLOCK:
        raise ValueError(f"{name} changes a layer that the transformer of Qwen-Image does not have, {quoted(flat)}")
    return f"transformer_blocks.{block[1]}.{DOTTED_BLOCK[block[2]]}"

"""The weights of diffusers' VAE of Qwen-Image under the names that ComfyUI loads, which are Wan's own."""

# From diffusers' names.
VAE_NAMES = (
    (".post_quant_conv.", ".conv2."),
    (".quant_conv.", ".conv1."),
    (".conv_in.", ".conv1."),
    (".conv_out.", ".head.2."),
    (".norm_out.", ".head.0."),
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
    (".down_blocks.", ".downsamples."),
)
# Those inside a residual block, which come first.
BLOCK_NAMES = (
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    (".conv_shortcut.", ".shortcut."),
)


def vae_name(name: str, resnets: int) -> str:
    """ComfyUI's name of a weight of diffusers' VAE, whose decoder has so many residual blocks a level."""
    if name.startswith("decoder.up_blocks."):
        level, kind, number, *rest = name.removeprefix("decoder.up_blocks.").split(".")
        place = int(level) * (resnets + 1) + (int(number) if kind == "resnets" else resnets)
        name = ".".join(["decoder.upsamples", str(place), *rest])
    name = f".{name}"
    for old, new in (*BLOCK_NAMES, *VAE_NAMES):
        name = name.replace(old, new)
    return name.removeprefix(".")

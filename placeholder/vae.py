"""The VAE of Qwen-Image on single pictures: it was made for video, and one frame needs a third of its arithmetic."""

from types import MethodType

import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor


def as_single_frame(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Let the causal 3-D convolutions compute as what they are on one frame: 2-D, by the last temporal slice of their kernels.

    All earlier frames that the other slices look at are zero padding then. Results are equal up to rounding; more than one
    frame is a ValueError from here on. Returns the same VAE.
    """
    for name, module in vae.named_modules():
        if isinstance(module, QwenImageCausalConv3d) and not name.endswith("time_conv"):
            module.forward = MethodType(_forward, module)
    return vae


def _forward(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """(B, C, 1, H, W) => (B, C', 1, H, W)."""
    if x.shape[2] != 1:
        raise ValueError(f"this VAE works on single pictures: got {x.shape[2]} frames, expected 1")
    left, _, top, *_ = conv._padding
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=(top, left))[:, :, None]

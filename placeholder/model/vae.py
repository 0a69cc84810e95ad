"""The VAE on single images: from pixels to the normalized, packed latents that the transformer reads."""

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from placeholder.model.base import QWEN_IMAGE

# Feature maps as wide as the decoder's last level and as large as the image that decoding has at once: counted on the shapes of
# Qwen-Image's VAE, 17.5 at 1664x928, 17.4 at 1328x1328, 17.2 at 2048x2048.
FEATURE_MAPS = 17.5


def as_single_frame(vae: nn.Module) -> nn.Module:
    """Replace the causal 3-D convolutions by what they are on one frame: 2-D, with the last temporal slice of their kernels.

    The other slices only see zero padding then. Results are equal up to rounding; more than one frame raises ValueError from
    here on. Returns the same VAE.
    """
    for name, module in vae.named_modules():
        if isinstance(module, QwenImageCausalConv3d) and not name.endswith("time_conv"):
            module.forward = MethodType(_forward, module)
    return vae


def _forward(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """(B, C, 1, H, W) => (B, C', 1, H, W)."""
    if x.shape[2] != 1:
        raise ValueError(f"this VAE works on single images: got {x.shape[2]} frames, expected 1")
    left, _, top, *_ = conv._padding
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=(top, left))[:, :, None]


def normalize(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Raw latents (B, C, H, W) => unit-variance latents; `mean` and `std` are (C,), the VAE config's latents_mean and _std."""
    return (latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) => (B, H/2 * W/2, C * 4), as the pipeline does it: one token for each 2x2 patch. H and W are even."""
    return QWEN_IMAGE.pipeline._pack_latents(latents, *latents.shape)


def decoding_bytes(vae: nn.Module, width: int, height: int) -> int:
    """Peak bytes of decoding an image of width x height pixels at once, without the libraries' workspaces."""
    return round(FEATURE_MAPS * vae.config.base_dim * vae.dtype.itemsize * width * height)


def tile_where_needed(vae: nn.Module, width: int, height: int, free: int) -> str | None:
    """Decode in overlapping tiles if the whole image does not fit into `free` bytes; returns a log line then."""
    needed = decoding_bytes(vae, width, height)
    if needed <= free or (width <= vae.tile_sample_min_width and height <= vae.tile_sample_min_height):
        vae.disable_tiling()
        return None
    vae.enable_tiling()
    return f"Memory: decoding {width}x{height} pixels needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB may be used: in tiles"


@torch.no_grad()
def encode_image(vae: nn.Module, pixels: Tensor) -> Tensor:
    """An image, uint8 (3, H, W) => normalized and packed latents, fp32 (H/16 * W/16, 64): the posterior's mode."""
    images = pixels.to(vae.device, vae.dtype)[None, :, None] / 127.5 - 1  # (1, 3, 1, H, W)
    latents = vae.encode(images).latent_dist.mode()[:, :, 0].float()  # (1, 16, H/8, W/8)
    mean, std = (torch.tensor(values, device=latents.device) for values in (vae.config.latents_mean, vae.config.latents_std))
    return pack(normalize(latents, mean, std))[0]

"""Between raw VAE latents and what the transformer reads: normalise, pack, and back."""

from torch import Tensor

PIXELS_A_TOKEN = 16  # along one side: 8 pixels a latent, 2 latents a token


def normalise(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Raw latents (B, C, H, W) => unit-variance latents; `mean` and `std` are (C,), the VAE config's latents_mean and _std."""
    return (latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) => (B, H/2 * W/2, C * 4): one token for each 2x2 patch. H and W are even."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)  # (B, C, H/2, 2, W/2, 2)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, H/2, W/2, C, 2, 2)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C * 4) => (B, C, height * 2, width * 2); `height` and `width` count tokens. Undoes `pack`."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height, width, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height * 2, width * 2)

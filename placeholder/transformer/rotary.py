"""Rotary embeddings in real numbers, for compiled blocks: PyTorch's compiler does not fuse complex ones."""

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

COMPLEX = transformer_qwenimage.apply_rotary_emb_qwen


def real_rotations(frequencies: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Complex rotations (L, D/2) of the image's tokens and (T, D/2) of the prompt's, each as cos and signed sin (L, 1, D)."""
    return tuple(
        (
            rotations.real.repeat_interleave(2, dim=-1)[:, None],
            torch.stack([-rotations.imag, rotations.imag], dim=-1).flatten(-2)[:, None],
        )
        for rotations in frequencies
    )


def rotate(
    x: Tensor, rotations: Tensor | tuple[Tensor, Tensor], use_real: bool = True, use_real_unbind_dim: int = -1
) -> Tensor:
    """Turn each pair of neighboring channels of x (B, L, H, D) by the angle whose cos and signed sin are `rotations`.

    It takes the place of diffusers' function, to which complex rotations (L, D/2) are left.
    """
    if use_real or isinstance(rotations, Tensor):
        return COMPLEX(x, rotations, use_real, use_real_unbind_dim)
    cos, sin = rotations
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).type_as(x)


transformer_qwenimage.apply_rotary_emb_qwen = rotate

"""Attention with rotary embeddings in real numbers, for compiled blocks: PyTorch's compiler does not fuse complex ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

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


def rotate(x: Tensor, rotations: tuple[Tensor, Tensor] | Tensor, use_real: bool = False) -> Tensor:
    """Turn each pair of neighboring channels of x (B, L, H, D) by the angle whose cos and signed sin are `rotations`.

    Complex rotations (L, D/2) are left to diffusers.
    """
    if isinstance(rotations, Tensor):
        return COMPLEX(x, rotations, use_real)
    cos, sin = rotations
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).type_as(x)


@contextmanager
def real_rotary_embeddings(transformer: nn.Module) -> Iterator[None]:
    """diffusers' attention in this transformer turns queries and keys in real numbers, equal up to rounding."""
    hook = transformer.pos_embed.register_forward_hook(lambda _module, _args, found: real_rotations(found))
    transformer_qwenimage.apply_rotary_emb_qwen = rotate
    try:
        yield
    finally:
        transformer_qwenimage.apply_rotary_emb_qwen = COMPLEX
        hook.remove()

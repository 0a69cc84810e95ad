"""Attention with rotary embeddings in real numbers, for compiled blocks: PyTorch's compiler does not fuse complex ones."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor


def real_rotations(frequencies: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Complex rotations (L, D/2) of the image's tokens and (T, D/2) of the prompt's, each as cos and signed sin (L, 1, D)."""
    return tuple(
        (
            rotations.real.repeat_interleave(2, dim=-1)[:, None],
            torch.stack([-rotations.imag, rotations.imag], dim=-1).flatten(-2)[:, None],
        )
        for rotations in frequencies
    )


def rotate(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighboring channels of x (B, L, H, D) by the angle whose cos and signed sin are `rotations`."""
    cos, sin = rotations
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).type_as(x)


class RealRotaryAttention(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' attention processor, equal up to rounding, for rotary embeddings from `real_rotations`.

    There is no mask: no prompt of a training is padded.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (B, L, C), of the image
        encoder_hidden_states: Tensor,  # (B, T, C), of the prompt
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What attention adds to the image's tokens (B, L, C) and to the prompt's (B, T, C)."""
        image_rotations, text_rotations = image_rotary_emb
        width = attn.inner_dim // attn.heads

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, width))  # (B, L, H, D)

        query = rotate(attn.norm_q(heads(attn.to_q(hidden_states))), image_rotations)
        key = rotate(attn.norm_k(heads(attn.to_k(hidden_states))), image_rotations)
        text_query = rotate(attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), text_rotations)
        text_key = rotate(attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), text_rotations)
        values = heads(attn.add_v_proj(encoder_hidden_states)), heads(attn.to_v(hidden_states))
        attended = dispatch_attention_fn(
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat(values, dim=1),
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # (B, T + L, H, D)
        text, image = attended.flatten(2).to(query.dtype).tensor_split([encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())

"""The small base model's text encoder and transformer, trained together on the VAE's latents."""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor, nn

from placeholder.model.base import QWEN_IMAGE
from placeholder.training.flow import add_noise, flow_loss, velocity_target
from standin import pool, small_base
from standin.world import SIDE

STAGES = {SIDE // 2: 3000, SIDE: 8000}  # steps by pixels: what a prompt asks for is learned faster on a quarter of the tokens
BATCH = 64
RATE, MATRIX_RATE = 1e-3, 1.5e-3  # of AdamW, of Muon
WEIGHT_DECAY = 0.01
CAPTION_DROPOUT = 0.1
# Noise levels are the sigmoid of normal numbers around these means, half each: the one the package trains with, and a high one.
# Below a sigma of about 0.9 (estimated) the noisy latents themselves show what a caption names: little is learned of captions.
HIGH_NOISE = 2.5
EMA = 0.995
SAVE_EVERY, LOG_EVERY = 250, 50


def autocast(device: torch.device) -> torch.autocast:
    """Products and convolutions in bf16: on a CPU with AVX512_BF16 products take a quarter of their time in fp32."""
    return torch.autocast(device.type, torch.bfloat16)


class Masked:
    """diffusers' attention for padded prompts, in plain products: on a CPU the fused gradient is four times slower in bf16."""

    mask: Tensor  # (B, T) of the prompts

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: None,
        attention_mask: None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See diffusers' QwenDoubleStreamAttnProcessor2_0; given to the transformer, a mask is copied back and forth."""
        projections = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        of_text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        image = self._projected(hidden_states, image_rotary_emb[0], attn.heads, *projections)
        text = self._projected(encoder_hidden_states, image_rotary_emb[1], attn.heads, *of_text)
        query, key, value = (torch.cat(parts, 1).transpose(1, 2) for parts in zip(text, image, strict=True))
        mask = F.pad(self.mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -1e9)
        joint = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        text, image = joint.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[0](image), attn.to_add_out(text)

    def _projected(self, states: Tensor, rotary: Tensor, heads: int, *layers: nn.Module) -> list[Tensor]:
        """Query, key and value (B, L, H, D) of one stream; `layers` are their three projections and two norms."""
        *projections, norm_q, norm_k = layers
        query, key, value = (projection(states).unflatten(-1, (heads, -1)) for projection in projections)
        return [
            *(apply_rotary_emb_qwen(x, rotary, use_real=False).to(value.dtype) for x in (norm_q(query), norm_k(key))),
            value,
        ]


class Denoiser(nn.Module):
    """Text encoder and transformer, and of the vocabulary the rows that the pool's captions use."""

    def __init__(self, components: dict[str, nn.Module], data: pool.Pool, compiled: bool = True):
        super().__init__()
        self.transformer, self.text_encoder = components["transformer"], components["text_encoder"].model.language_model
        self.used = torch.cat([data.ids.flatten(), data.empty]).unique()
        self.rows = nn.Parameter(self.text_encoder.embed_tokens.weight.detach()[self.used].clone())
        self.text_encoder.embed_tokens = None  # a gradient of the whole vocabulary would cost more than all the rest
        self.dropped = QWEN_IMAGE.dropped_tokens
        self.text_encoder.set_attn_implementation("eager")
        self.processor = Masked()
        self.transformer.set_attn_processor(self.processor)
        for layer in (*self.transformer.transformer_blocks, *self.text_encoder.layers) if compiled else ():
            layer.compile(dynamic=False)

    def forward(self, positions: Tensor, lengths: Tensor, noisy: Tensor, sigmas: Tensor) -> Tensor:
        """The velocity (B, L, C) for prompts as positions among the rows (B, T) with lengths (B,)."""
        # Attention is causal and the padding comes last: no token of a prompt sees it.
        hidden = self.text_encoder(inputs_embeds=self.rows[positions], use_cache=False).last_hidden_state
        mask = torch.arange(positions.shape[1], device=positions.device)[None] < lengths[:, None]
        self.processor.mask = mask[:, self.dropped :]
        grid = math.isqrt(noisy.shape[1])
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas,
            encoder_hidden_states=hidden[:, self.dropped :],
            img_shapes=[[(1, grid, grid)]] * len(noisy),
            return_dict=False,
        )[0]


class Batches:
    """Prompts as positions among the denoiser's rows, with latents, noise and sigmas; a step's number seeds its batch."""

    def __init__(self, data: pool.Pool, latents: Tensor, used: Tensor, device: torch.device):
        lookup = torch.zeros(small_base.VOCABULARY_ROWS, dtype=torch.long)
        lookup[used] = torch.arange(len(used))
        self.positions, self.empty = lookup[data.ids][..., : data.lengths.max()], lookup[data.empty][: data.lengths.max()]
        self.lengths, self.empty_length, self.latents, self.device = data.lengths, data.empty_length, latents, device

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """Positions (B, T), their lengths (B,), clean latents (B, L, C), noise (B, L, C), sigmas (B,)."""
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(0, len(self.latents), (BATCH,), generator=generator)
        which = torch.randint(0, pool.CAPTIONS, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        prompts = torch.where(dropped[:, None], self.empty, self.positions[index, which])
        length = torch.where(dropped, self.empty_length, self.lengths[index, which])
        clean = self.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        high = torch.arange(BATCH) % 2 * (HIGH_NOISE - (mu := calculate_shift(clean.shape[1], 256, 8192, 0.5, 0.9)))
        sigmas = torch.sigmoid(torch.randn(BATCH, generator=generator) + mu + high)
        return tuple(part.to(self.device) for part in (prompts, length, clean, noise, sigmas))


class Run:
    """The weights in training, their average, the optimizers, and how far it is; kept in a file."""

    def __init__(self, model: Denoiser, steps: int, path: Path):
        self.model, self.steps, self.path, self.step, self.seconds, self.loss = model, steps, path, 0, 0.0, 0.0
        self.parameters = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        layers = (model.transformer.transformer_blocks, model.text_encoder.layers)
        matrices = [p for name, p in layers[0].named_parameters() if p.ndim == 2 and "_mod." not in name]
        matrices += [p for p in layers[1].parameters() if p.ndim == 2]
        others = set(self.parameters) - set(matrices)
        # Muon (Jordan 2024) with updates of the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).
        self.muon = torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        rest = [p for p in self.parameters if p in others]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
        if path.exists():
            self._restore(torch.load(path, weights_only=True))

    def update(self, loss: Tensor) -> None:
        """One step with the gradients that are there, clipped to norm 1."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        share = ramp(self.step, self.steps, warmup=100)
        for optimizer, rate in ((self.adamw, RATE), (self.muon, MATRIX_RATE)):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        self.model.zero_grad()
        torch._foreach_lerp_(self.average, self.parameters, 1 - min(EMA, (1 + self.step) / (10 + self.step)))
        self.loss += (loss.item() - self.loss) * (0.02 if self.step else 1)
        self.step += 1

    def keep(self) -> None:
        """Write all that the run needs to go on."""
        unfinished = self.path.with_suffix(".partial")
        torch.save({name: getattr(self, name) for name in ("step", "seconds", "loss", "average")} | self._states(), unfinished)
        unfinished.replace(self.path)

    def _states(self) -> dict:
        parameters = [parameter.detach() for parameter in self.parameters]
        return {"parameters": parameters, "adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    @torch.no_grad()
    def _restore(self, kept: dict) -> None:
        self.step, self.seconds, self.loss = kept["step"], kept["seconds"], kept["loss"]
        torch._foreach_copy_(self.parameters, kept["parameters"])
        torch._foreach_copy_(self.average, kept["average"])
        self.adamw.load_state_dict(kept["adamw"])
        self.muon.load_state_dict(kept["muon"])


def train(model: Denoiser, batches: Batches, side: int, path: Path) -> None:
    """One of STAGES; `model` has the averaged weights in the end. The state is kept in `path` every SAVE_EVERY steps."""
    run = Run(model, STAGES[side], path)
    last, device = time.monotonic(), batches.device
    while run.step < run.steps:
        positions, lengths, clean, noise, sigmas = batches.draw(run.step)
        with autocast(device):
            predicted = model(positions, lengths, add_noise(clean, noise, sigmas), sigmas)
        loss = flow_loss(predicted, velocity_target(clean, noise)).mean()
        loss.backward()
        run.update(loss)
        run.seconds, last = run.seconds + time.monotonic() - last, time.monotonic()
        if run.step % LOG_EVERY == 0:
            print(f"{side} pixels, {run.step} of {run.steps}: {run.seconds:.0f} s, loss {run.loss:.4f}", flush=True)
        if run.step % SAVE_EVERY == 0 or run.step == run.steps:
            run.keep()
    with torch.no_grad():
        torch._foreach_copy_(run.parameters, run.average)


def save(model: Denoiser, vae: nn.Module, statistics: tuple[Tensor, Tensor]) -> None:
    """Write the weights out, with the mean and the standard deviation (16,) of the VAE's latents."""
    rows = dict(zip(model.used.tolist(), model.rows.detach().cpu(), strict=True))
    small_base.save_trained(vae, *statistics, model.text_encoder, rows, model.transformer)


def ramp(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up over `warmup` steps, then down to 3 % along a straight line."""
    return min(1.0, (step + 1) / warmup) * max(0.03, 1 - step / steps)

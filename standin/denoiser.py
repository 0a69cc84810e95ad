"""The small base model's text encoder and transformer, trained together on the VAE's latents."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor, nn

from placeholder.tokens.prompt_encoder import prompt_template
from placeholder.training.flow import add_noise, flow_loss, velocity_target
from standin import pool, small_base
from standin.world import SIDE

STAGES = {SIDE // 2: 4600, SIDE: 1500}  # steps by pixels: what a prompt asks for is learned faster on a quarter of the tokens
BATCH = 64
RATE, MATRIX_RATE = 1e-3, 1.5e-3  # of AdamW, of Muon
WEIGHT_DECAY = 0.01
CAPTION_DROPOUT = 0.1
# Noise levels are the sigmoid of normal numbers around these means, half each: the one the package trains with, and a high one.
# Below a sigma of about 0.9 (estimated) the noisy latents themselves show what a caption names: little is learned of captions.
HIGH_NOISE = 2.5
EMA = 0.995
SAVE_EVERY, LOG_EVERY = 250, 50


class Masked(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' attention for padded prompts; given to the transformer, the mask (B, T) would be copied there and back."""

    mask: Tensor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See diffusers, which passes on the arguments that are named here; it gives no mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, attention_mask, image_rotary_emb)


class Denoiser(nn.Module):
    """Text encoder and transformer, and of the vocabulary the rows that the pool's captions use."""

    def __init__(self, components: dict[str, nn.Module], data: pool.Pool, compiled: bool = True):
        super().__init__()
        self.transformer, self.text_encoder = components["transformer"], components["text_encoder"].model.language_model
        self.used = torch.cat([data.ids.flatten(), data.empty]).unique()
        self.rows = nn.Parameter(self.text_encoder.embed_tokens.weight.detach()[self.used].clone())
        self.text_encoder.embed_tokens = None  # a gradient of the whole vocabulary would cost more than all the rest
        self.dropped = prompt_template()[2]
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
    """Prompts as positions among the denoiser's rows, with latents, noise and noise levels; a step's number seeds its batch."""

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


class Muon:
    """Muon (Jordan 2024) with Nesterov momentum in fp32, the matrices of one shape together.

    torch.optim.Muon orthogonalizes one by one in bf16: ten times slower on a CPU that has none. Updates have the size of
    AdamW's (Liu et al. 2025, arXiv:2502.16982).
    """

    momentum, coefficients, iterations = 0.95, (3.4445, -4.7750, 2.0315), 5

    def __init__(self, matrices: Iterable[nn.Parameter]):
        self.shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self.shapes.setdefault(matrix.shape, []).append(matrix)
        self.buffers = [torch.zeros(len(same), *shape, device=same[0].device) for shape, same in self.shapes.items()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at this learning rate."""
        for (shape, matrices), buffer in zip(self.shapes.items(), self.buffers, strict=True):
            # What the last block makes of the text is not read by anything.
            gradients = torch.stack([torch.zeros_like(m) if m.grad is None else m.grad for m in matrices])
            buffer.lerp_(gradients, 1 - self.momentum)
            update = self.orthogonal(gradients.lerp_(buffer, self.momentum))
            torch._foreach_mul_(matrices, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate * 0.2 * max(shape) ** 0.5)

    def orthogonal(self, matrices: Tensor) -> Tensor:
        """(N, R, C) with all singular values near 1, by the quintic Newton-Schulz iteration."""
        wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
        wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = self.coefficients
        for _ in range(self.iterations):
            gram = wide @ wide.mT
            wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


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
        self.muon = Muon(matrices)
        self.adamw = torch.optim.AdamW([p for p in self.parameters if p in others], betas=(0.9, 0.98), fused=True)
        if path.exists():
            self._restore(torch.load(path, weights_only=True))

    def update(self, loss: Tensor) -> None:
        """One step with the gradients that are there, clipped to norm 1."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        share = ramp(self.step, self.steps, warmup=100)
        self.adamw.param_groups[0] |= {"lr": RATE * share, "weight_decay": WEIGHT_DECAY}
        self.adamw.step()
        self.muon.step(MATRIX_RATE * share)
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
        return {"parameters": parameters, "adamw": self.adamw.state_dict(), "muon": self.muon.buffers}

    @torch.no_grad()
    def _restore(self, kept: dict) -> None:
        self.step, self.seconds, self.loss = kept["step"], kept["seconds"], kept["loss"]
        for own, stored in ((self.parameters, "parameters"), (self.average, "average"), (self.muon.buffers, "muon")):
            torch._foreach_copy_(own, kept[stored])
        self.adamw.load_state_dict(kept["adamw"])


def train(model: Denoiser, batches: Batches, side: int, path: Path) -> None:
    """One of STAGES; `model` has the averaged weights in the end. The state is kept in `path` every SAVE_EVERY steps."""
    run = Run(model, STAGES[side], path)
    last = time.monotonic()
    while run.step < run.steps:
        positions, lengths, clean, noise, sigmas = batches.draw(run.step)
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

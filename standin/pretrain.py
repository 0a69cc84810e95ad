"""Pretrain the small base model: the VAE, then text encoder and transformer together (standin/denoiser.py), coarse and fine.

`python -m standin.pretrain vae`, `... 64` and `... 128` are its parts. Each goes on from standin/small_base.safetensors and
writes it; the pool of images and the state of a part are kept in .cache/pretrain, so that one that was stopped goes on.
docs/study.md says how the weights that ship were made.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from placeholder.model.vae import as_single_frame, normalize, pack
from standin import denoiser, pool, small_base
from standin.world import SIDE

FOLDER = small_base.CACHE / "pretrain"
BATCH, RATE = 16, 1e-3
CROP = 64  # pixels: what the VAE learns from; but for one attention it is convolutional
LOG_EVERY = 50
START_LOGVAR = -5.0


@dataclass(frozen=True)
class Stage:
    """A part of the VAE's training, on random crops and, of so large a share of each batch, on whole images made smaller.

    `noise` is added to the latents, so that small errors of the transformer decode well: it costs sharpness, and comes down.
    `kl` is the weight of the posterior's divergence, a mean over the latents: 1e-4 leaves a standard deviation of 0.05.
    `small` is that of the latents' mean square.
    """

    steps: int
    whole: float
    noise: float
    kl: float
    small: float


STAGES = (Stage(4000, 0.5, 0.1, 1e-4, 1e-3), Stage(6000, 0.0, 0.04, 1e-5, 1e-4))


def train_vae(vae: AutoencoderKLQwenImage, images: Tensor, device: torch.device, number: int) -> None:
    """One of STAGES on images (N, 3, H, W)."""
    stage = STAGES[number]
    vae.to(device).train()
    vae.encoder.compile()
    vae.decoder.compile()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(small_base.SEED + number)
    start = time.monotonic()
    for step in range(stage.steps):
        chosen = images[torch.randint(0, len(images), (BATCH,), generator=generator)]
        pixels = crops(chosen, stage.whole, generator).to(device)[:, :, None]
        with denoiser.autocast(device):
            loss, decoded, std = vae_loss(vae, pixels, stage, generator)
        loss.backward()
        clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * denoiser.ramp(step, stage.steps, warmup=100)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step == stage.steps - 1:
            error, seconds = F.mse_loss(decoded.clamp(-1, 1), pixels), time.monotonic() - start
            print(f"vae {number}, {step}: {seconds:.0f} s, loss {loss:.4f}, mse {error:.5f}, posterior {std:.3f}", flush=True)
        if step % 500 == 0 or step == stage.steps - 1:
            sheet(torch.cat([pixels[:, :, 0], decoded[:, :, 0].clamp(-1, 1)]).detach().cpu(), 16).save(FOLDER / "vae.png")


def vae_loss(
    vae: AutoencoderKLQwenImage, pixels: Tensor, stage: Stage, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss on pixels (B, 3, 1, H, W), the decoded pixels, and the posterior's standard deviation, a mean."""
    # vae.decode clamps to [-1, 1], which would stop the gradient wherever a pixel is off by much.
    posterior = encoded(vae, pixels)
    noise, blur = torch.randn(2, *posterior.mean.shape, generator=generator).to(pixels.device)
    decoded = vae.decoder(vae.post_quant_conv(posterior.mean + posterior.std * noise + stage.noise * blur))
    edges = sum(F.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim)) for dim in (3, 4))
    kl = 0.5 * (posterior.var - 1 - posterior.logvar).mean()
    loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + edges + stage.kl * kl
    return loss + stage.small * posterior.mean.square().mean(), decoded, posterior.std.mean()


def encoded(vae: AutoencoderKLQwenImage, pixels: Tensor) -> DiagonalGaussianDistribution:
    """What vae.encode gives for pixels (B, 3, 1, H, W), without its loop over frames, which does not compile."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(pixels)))


def crops(images: Tensor, whole: float, generator: torch.Generator) -> Tensor:
    """Of images (B, 3, H, W) the first so large a share reduced to CROP pixels, of the others a random square of so many."""
    reduced, parts = to_unit(images).split([count := round(whole * len(images)), len(images) - count])
    lefts, tops = torch.randint(0, images.shape[-1] - CROP + 1, (2, len(parts)), generator=generator).tolist()
    squares = [part[:, y : y + CROP, x : x + CROP] for part, x, y in zip(parts, lefts, tops, strict=True)]
    squares = torch.stack(squares)
    return torch.cat([F.interpolate(reduced, size=CROP, mode="area"), squares]) if count else squares


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, side: int, device: torch.device) -> Tensor:
    """The posterior's mode (N, 16, side / 8, side / 8) for images (N, 3, H, W) reduced to this side."""
    vae.to(device).eval().encoder.compile(dynamic=False)
    parts = (F.interpolate(to_unit(part), size=side, mode="area").to(device) for part in images.split(50))
    with denoiser.autocast(device):
        return torch.cat([encoded(vae, part[:, :, None]).mode()[:, :, 0].float().cpu() for part in parts])


def kept_latents(vae: nn.Module, images: Tensor, side: int, device: torch.device) -> Tensor:
    """What `encode` gives, from a file where it is there; the VAE's training removes it."""
    path = FOLDER / f"latents-{side}.safetensors"
    if not path.exists():
        save_file({"latents": encode(vae, images, side, device).contiguous()}, path)
    return load_file(path)["latents"]


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) as fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] side by side."""
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    return Image.fromarray(((torch.cat(rows, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def trained_vae(images: Tensor, device: torch.device) -> AutoencoderKLQwenImage:
    """The VAE after all STAGES; each one's result is kept."""
    vae = small_base.new_components(small_base.TRAINED_SIZE, small_base.SEED)["vae"]
    as_single_frame(vae)
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = START_LOGVAR
    for stale in FOLDER.glob("latents-*"):
        stale.unlink()
    for number in range(len(STAGES)):
        kept = FOLDER / f"vae-{number}.safetensors"
        if not kept.exists():
            train_vae(vae, images, device, number)
            save_file({name: value.cpu().contiguous() for name, value in vae.state_dict().items()}, kept)
        vae.load_state_dict(load_file(kept))
    return vae.eval().requires_grad_(False)


def main() -> None:
    """Build the pool unless it is there, and make one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", *map(str, denoiser.STAGES)])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captioned", type=int, default=pool.CAPTIONED, help="fewer images, to try it out")
    parser.add_argument("--others", type=int, default=pool.UNCAPTIONED, help="fewer images, to try it out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = pool.build(FOLDER, arguments.captioned, arguments.others)
    if arguments.part == "vae":
        components = small_base.new_components(small_base.TRAINED_SIZE, small_base.SEED)
        components["vae"] = trained_vae(data.images, device)
        latents = encode(components["vae"], data.images[: len(data.ids)], SIDE, device)
        statistics = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        denoiser.save(denoiser.Denoiser(components, data), components["vae"], statistics)
    else:
        components = small_base.trained_components()
        vae, side = as_single_frame(components["vae"]), int(arguments.part)
        statistics = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        latents = pack(normalize(kept_latents(vae, data.images[: len(data.ids)], side, device), *statistics))
        model = denoiser.Denoiser(components, data).to(device)
        denoiser.train(model, denoiser.Batches(data, latents, model.used, device), side, FOLDER / f"{side}.pt")
        denoiser.save(model, vae, statistics)


if __name__ == "__main__":
    main()

"""Train the small base model on the synthetic world: the VAE, then text encoder and transformer together.

`python -m standin.pretrain vae` keeps its result under .cache/pretrain. `python -m standin.pretrain denoiser` writes
standin/small_base.safetensors; `--go-on 1` and then `--go-on 2` continue from it. docs/study.md says how the weights that
ship were made, on which machine and in what time.
"""

import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from placeholder.model.vae import as_single_frame, normalize, pack
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, prompt_ids, prompt_template
from placeholder.training.flow import add_noise, flow_loss, shift_mu, shift_sigmas, velocity_target
from standin import small_base
from standin.world import COLORS, SIDE, held_out, random_caption, random_scene, render

FOLDER = small_base.CACHE / "pretrain"
POOL = 30_000  # scenes
VAE_STEPS, VAE_BATCH, VAE_RATE = 4000, 16, 6e-4
STEPS, BATCH, RATE = 4200, 64, 8e-4  # of one round
CAPTION_DROPOUT = 0.1
SAVE_EVERY = 1000
LATENT_NOISE = 0.1  # added to the latents while the VAE learns, so that small errors of the transformer decode well


def train_vae(steps: int) -> None:
    """The VAE on the world's images and on random clutter, so that it can also show what the world does not hold."""
    torch.manual_seed(small_base.SEED)
    rng = random.Random(small_base.SEED)
    vae = small_base.new_vae(small_base.TRAINED_SIZE)  # the weights that new_components starts from with the same seed
    as_single_frame(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=0.0)
    start = time.monotonic()
    for step in range(steps):
        images = [clutter(rng) if rng.random() < 0.25 else render(random_scene(rng)) for _ in range(VAE_BATCH)]
        pixels = to_tensor(images)[:, :, None]  # (B, 3, 1, H, W)
        optimizer.param_groups[0]["lr"] = VAE_RATE * ramp(step, steps, warmup=50)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean
            # vae.decode clamps to [-1, 1], which would stop the gradient wherever a pixel is off by much.
            decoded = vae.decoder(vae.post_quant_conv(mean + LATENT_NOISE * torch.randn_like(mean)))
        mean, decoded = mean.float(), decoded.float()
        error = F.mse_loss(decoded, pixels)
        loss = F.l1_loss(decoded, pixels) + error + 1e-3 * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"vae {step}/{steps} {time.monotonic() - start:.0f} s loss {loss.item():.4f} mse {error.item():.5f}", flush=True
            )
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in vae.state_dict().items()}, FOLDER / "vae.safetensors")
    reconstructions = torch.cat([pixels[:8, :, 0], decoded[:8, :, 0].clamp(-1, 1)]).detach()
    sheet(reconstructions, columns=8).save(FOLDER / "vae.png")


def train_denoiser(steps: int, go_on: int) -> None:
    """Text encoder and transformer together on the VAE's latents; then everything is written out.

    With `go_on` 0 from the seeded start, otherwise from what was written last, with other scenes for every number.
    """
    torch.manual_seed(small_base.SEED + go_on)
    rng = random.Random(small_base.SEED + 1 + go_on)
    if go_on:
        components = small_base.trained_components()
    else:
        components = small_base.new_components(small_base.TRAINED_SIZE, small_base.SEED)
        components["vae"].load_state_dict(load_file(FOLDER / "vae.safetensors"))
    vae, transformer = components["vae"], components["transformer"]
    as_single_frame(vae.eval())
    scenes = [scene for scene in (random_scene(rng) for _ in range(POOL)) if not held_out(scene)]
    latents, mean, std = encode_pool(vae, scenes)

    tokenizer = small_base.qwen_tokenizer()
    text_encoder = components["text_encoder"].model.language_model
    no_tokens = PlaceholderTokens(len(tokenizer), {}, small_base.TRAINED_SIZE.text_width)
    used = sorted(
        {i for scene in scenes for _ in range(3) for i in prompt_ids(tokenizer, no_tokens, random_caption(scene, rng))}
    )
    used = sorted({*used, *prompt_ids(tokenizer, no_tokens, EMPTY_PROMPT)})
    lookup = torch.zeros(small_base.VOCABULARY_ROWS, dtype=torch.long)
    lookup[torch.tensor(used)] = torch.arange(len(used))
    # Only the rows that captions use are trained: a gradient of the whole vocabulary would cost more than all the rest.
    rows = torch.nn.Parameter(text_encoder.embed_tokens.weight.detach()[used].clone())
    text_encoder.embed_tokens.requires_grad_(False)
    parameters = [rows, *transformer.parameters(), *(p for p in text_encoder.parameters() if p.requires_grad)]
    matrices = [p for p in (*transformer.transformer_blocks.parameters(), *text_encoder.layers.parameters()) if p.ndim == 2]
    of_matrices = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in of_matrices]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.01, betas=(0.9, 0.99), fused=True),
    ]
    dropped = prompt_template()[2]
    mu = shift_mu(latents.shape[1], 256, 8192, 0.5, 0.9)
    grid = SIDE // 16
    start, running = time.monotonic(), 2.0
    for step in range(steps):
        index = torch.randint(0, len(scenes), (BATCH,)).tolist()
        prompts = [EMPTY_PROMPT if rng.random() < CAPTION_DROPOUT else random_caption(scenes[i], rng) for i in index]
        ids = [prompt_ids(tokenizer, no_tokens, prompt) for prompt in prompts]
        mask = torch.zeros(BATCH, max(map(len, ids)), dtype=torch.long)
        positions = torch.zeros_like(mask)
        for row, prompt in enumerate(ids):
            mask[row, : len(prompt)] = 1
            positions[row, : len(prompt)] = lookup[torch.tensor(prompt)]
        clean, noise = latents[index], torch.randn(BATCH, *latents.shape[1:])
        sigmas = shift_sigmas(torch.sigmoid(torch.randn(BATCH)), mu)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = text_encoder(inputs_embeds=rows[positions], attention_mask=mask, use_cache=False).last_hidden_state
            predicted = transformer(
                hidden_states=add_noise(clean, noise, sigmas),
                timestep=sigmas,
                encoder_hidden_states=hidden[:, dropped:],
                encoder_hidden_states_mask=mask[:, dropped:],
                img_shapes=[[(1, grid, grid)]] * BATCH,
                return_dict=False,
            )[0]
        loss = flow_loss(predicted, velocity_target(clean, noise)).mean()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = RATE * ramp(step, steps, warmup=100)
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running = 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"denoiser {step}/{steps} {time.monotonic() - start:.0f} s loss {running:.4f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step == steps - 1:
            small_base.save_trained(vae, mean, std, text_encoder, dict(zip(used, rows.detach(), strict=True)), transformer)


@torch.no_grad()
def encode_pool(vae: AutoencoderKLQwenImage, scenes: list) -> tuple[Tensor, Tensor, Tensor]:
    """Packed and normalized latents of the scenes (N, 16, 64), with the mean and std (16,) they were normalized by."""
    raw = [
        vae.encode(to_tensor([render(s) for s in scenes[i : i + 64]])[:, :, None]).latent_dist.mean[:, :, 0]
        for i in range(0, len(scenes), 64)
    ]
    latents = torch.cat(raw)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    return pack(normalize(latents, mean, std)), mean, std


def clutter(rng: random.Random) -> Image.Image:
    """Random ellipses, rectangles and triangles in random colors."""
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), rng.choice(list(COLORS.values())))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 7)):
        x, y = rng.uniform(0, 2 * SIDE), rng.uniform(0, 2 * SIDE)
        w, h = rng.uniform(4, SIDE), rng.uniform(4, SIDE)
        color = tuple(rng.randrange(256) for _ in range(3))
        if (draw := rng.random()) < 0.4:
            pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=color)
        elif draw < 0.7:
            pen.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=color)
        else:
            pen.polygon([(x + rng.uniform(-w, w), y + rng.uniform(-h, h)) for _ in range(3)], fill=color)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def ramp(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up over `warmup` steps, then down to 3 % along a straight line."""
    return min(1.0, (step + 1) / warmup) * max(0.03, 1 - step / steps)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Images as (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] side by side, three times as large."""
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    array = ((torch.cat(rows, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((array.shape[1] * 3, array.shape[0] * 3), Image.Resampling.NEAREST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "denoiser"])
    parser.add_argument("--steps", type=int, help="fewer steps, to try it out")
    parser.add_argument("--go-on", type=int, default=0, metavar="N", help="the N-th round: from the weights written last")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part == "vae":
        train_vae(arguments.steps or VAE_STEPS)
    else:
        train_denoiser(arguments.steps or STEPS, arguments.go_on)

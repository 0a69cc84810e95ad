"""A whole small training, from the data set to the saved LoRA, on one CPU thread: as diffusers' script does it, and ours.

`make bench` runs both in turns, each from its own data set on disk, and writes benchmarks/job.json. The models are small ones
with seeded random weights; the same pictures, captions, steps, rank and layers for both. Ours writes and proves an archive too.
"""

import json
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from benchmarks.step import GRID, HEAD_WIDTH, HEADS, RANK, RATE, Inputs, Script, transformer
from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.model.base import BaseModel
from placeholder.model.vae import normalize
from standin.small_base import Size, new_components, qwen_tokenizer, scheduler
from standin.subject import IMAGES_EACH, SEEN_BACKGROUNDS, write_images
from standin.world import TRIGGER, render, subject_scene

STEPS, ROUNDS = 100, 5
SIDE = 16 * GRID[0]  # pixels
SIZE = Size(text_width=HEADS * HEAD_WIDTH, text_layers=4, blocks=0, heads=1, vae_width=16)


def write_base(folder: Path) -> BaseModel:
    """The models of the step's benchmark with a text encoder and a VAE, as a folder."""
    components = new_components(SIZE, seed=0) | {"transformer": transformer()}
    QwenImagePipeline(scheduler=scheduler(), tokenizer=qwen_tokenizer(), **components).save_pretrained(folder)
    return BaseModel(str(folder), torch.device("cpu"), torch.float32)


def write_dataset(path: Path) -> Path:
    """Twelve pictures with captions."""
    scenes = [(where, subject_scene(where, seed)) for seed, where in enumerate(SEEN_BACKGROUNDS * IMAGES_EACH)]
    captioned = [(render(scene, SIDE), f"a photo of a {TRIGGER} house on a {where} background") for where, scene in scenes]
    return write_images(path, captioned)


@torch.no_grad()
def script_inputs(base: BaseModel, pictures: list[tuple[Image.Image, str]]) -> list[Inputs]:
    """What the script keeps of the data set with --cache_latents and captions of their own: embeddings and latents."""
    vae = base.component(AutoencoderKLQwenImage, "vae")
    text_encoder = base.component(Qwen2_5_VLForConditionalGeneration, "text_encoder")
    tokenizer = base.component(Qwen2Tokenizer, "tokenizer")
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None)
    mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
    found = []
    for image, caption in pictures:
        embeds, _ = pipeline.encode_prompt(caption, max_sequence_length=512)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1  # (1, 3, 1, H, W)
        found.append(Inputs(normalize(vae.encode(pixels).latent_dist.sample()[:, :, 0], mean, std), embeds))
    return found


def script_job(base: BaseModel, folder: Path, checkpointing: bool) -> dict[str, float]:
    """The script's training; seconds of the caching and of everything."""
    start = time.perf_counter()
    pictures = [
        (Image.open(path).convert("RGB"), path.with_suffix(".txt").read_text()) for path in sorted(folder.glob("*.png"))
    ]
    inputs = script_inputs(base, pictures)
    cached = time.perf_counter() - start
    script = Script(inputs[0], checkpointing, base.component(QwenImageTransformer2DModel, "transformer").requires_grad_(False))
    for number in range(STEPS):
        script.inputs = inputs[number % len(inputs)]
        script.step()
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(script.transformer))
    QwenImagePipeline.save_lora_weights(folder / "script", transformer_lora_layers=state)
    return {"cached_s": cached, "seconds": time.perf_counter() - start}


def our_job(base: BaseModel, dataset: Path, output: Path) -> dict[str, float]:
    """Our training; seconds until the first step and of everything."""
    start = time.perf_counter()
    config = TrainConfig(
        steps=STEPS, rank=RANK, learning_rate=RATE, resolution=(SIDE,), caption_dropout=0.0, seed=0, report=False
    )
    meta = finetune(Job(dataset, config, output), base, log=lambda line: None)
    seconds = time.perf_counter() - start
    return {"steps_s": meta["training_seconds"], "seconds": seconds}


def main() -> None:
    """Run both in turns and write the result."""
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {"script, checkpointing": [], "script": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, dataset = write_base(folder / "base"), write_dataset(folder / "data.zip")
        zipfile.ZipFile(dataset).extractall(folder / "data")
        for _ in range(1 + ROUNDS):  # the first is a warm-up
            runs["script, checkpointing"].append(script_job(base, folder / "data", True))
            runs["script"].append(script_job(base, folder / "data", False))
            runs["ours"].append(our_job(base, dataset, folder / "weights.zip"))
            print({name: found[-1] for name, found in runs.items()}, flush=True)
    medians = {name: statistics.median(run["seconds"] for run in found[1:]) for name, found in runs.items()}
    record = {
        "steps": STEPS,
        "pictures": IMAGES_EACH * len(SEEN_BACKGROUNDS),
        "side": SIDE,
        "median_seconds": medians,
        "ratios": {name: medians["ours"] / medians[name] for name in ("script, checkpointing", "script")},
        "runs": {name: found[1:] for name, found in runs.items()},
    }
    (Path(__file__).parent / "job.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""Two tokens in one training: whether both subjects appear, each alone and both in one image.

`make two-tokens` runs it on the small base model and writes docs/two-tokens.json, docs/two-tokens.png and tables
of docs/study.md, which defines every measure.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from checks.docs_tables import write_table
from placeholder.config import UNGATED_PRESERVATION, TrainConfig
from placeholder.finetune import finetune
from placeholder.job import Job
from placeholder.lora.adapter import ADAPTER, load_lora, without_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder, load_tokenizer, load_transformer, load_vae
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, initial_embeddings
from placeholder.weights.archive import Weights, read_weights
from standin.judge import to_pixels
from standin.sampler import Sampler
from standin.small_base import build_small_base
from standin.world import RARE_WORD, SIDE, TRIGGER
from study.measures import UNRELATED, difference
from study.tables import sheet
from study.two_measures import Generate, measures, old_meaning, rendered
from study.two_sheet import COLUMNS, strip, tables
from study.two_subjects import nouns, taught, write_dataset

TOKENS = ("<zwx>", "<qrs>")
TRIGGERS = (TRIGGER, RARE_WORD)
BUDGET = {"steps": 500, "rank": 8, "learning_rate": 1e-3, "batch_size": 4, "resolution": (SIDE,), "report": False}
SAMPLES = 3  # images a prompt
LOW_SCALE = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to teach two subjects: what they are called, what the data set holds, what differs from the defaults."""

    words: tuple[str, str] = TOKENS
    together: bool = True
    trained: bool = True
    gated: bool = True

    @property
    def named(self) -> tuple[str, str]:
        """What captions and prompts call the two."""
        return nouns(self.words)

    def config(self, seed: int) -> TrainConfig:
        """The options of its training."""
        tokens = self.words if self.words == TOKENS else ()
        return TrainConfig(
            **BUDGET,
            seed=seed,
            train_placeholder_token=bool(tokens),
            placeholder_token=tokens,
            token_gate=self.gated,
            prior_preservation=0.0 if self.gated else UNGATED_PRESERVATION,
        )


ARMS: dict[str, Arm] = {
    "base model": Arm(trained=False, gated=False),
    "two tokens": Arm(),
    "two tokens, no picture of both": Arm(together=False),
    "two tokens, no gate": Arm(gated=False),
    "trigger words TOK and sks": Arm(words=TRIGGERS, gated=False),
}
RENDERED, THROUGH_VAE = "as the world draws them", "the same, through the VAE"


def train_arm(arm: Arm, seed: int, base: BaseModel) -> tuple[Weights | None, dict]:
    """One training by the package, from an archive of images to an archive of weights, and what its record says."""
    if not arm.trained:
        return None, {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "data.zip", taught(arm.named, arm.together))
        output = Path(folder) / "weights.zip"
        meta = finetune(Job(dataset, arm.config(seed), output), base, log=lambda line: None)
        return read_weights(output), {name: meta[name] for name in ("training_seconds", "diagnostics") if name in meta}


def sampler_of(weights: Weights | None, seed: int, base: BaseModel) -> Sampler:
    """The base model with an archive on it; without one with tokens that no training has touched."""
    tokenizer, encoder, transformer = load_tokenizer(base), load_text_encoder(base), load_transformer(base)
    width = encoder.embed_tokens.embedding_dim
    if weights is None:
        std = TrainConfig().placeholder_init_std
        rows = initial_embeddings(TOKENS, width, std, torch.Generator().manual_seed(seed))
    else:
        rows = weights.embeddings
        load_lora(transformer, weights.lora)
    return Sampler(base, transformer, encoder, tokenizer, PlaceholderTokens(len(tokenizer), rows, width))


def run_arm(arm: Arm, seed: int, base: BaseModel) -> tuple[dict, list[Image.Image]]:
    """One training with its measures and a strip of images."""
    weights, record = train_arm(arm, seed, base)
    sampler = sampler_of(weights, seed, base)
    sampler.acts = (lambda prompt: any(word in prompt for word in arm.words)) if arm.gated else None

    def generate(spec) -> list[Image.Image]:
        return sampler.sample(spec.caption, SAMPLES)

    found = measures(generate, arm.named) | {"old_meaning": old_meaning(generate, arm.words), "drift": 0.0} | record
    if weights is not None:
        unrelated = sampler.sample_all(UNRELATED, SAMPLES)
        with without_lora(sampler.transformer):
            found["drift"] = difference(unrelated, sampler.sample_all(UNRELATED, SAMPLES))
        sampler.transformer.set_adapters(ADAPTER, weights=LOW_SCALE)
        found["old_meaning_low_scale"] = old_meaning(generate, arm.words)
        sampler.transformer.set_adapters(ADAPTER, weights=1.0)
    else:
        found["old_meaning_low_scale"] = found["old_meaning"]
    return found, strip(generate, arm.named)


def ceilings(base: BaseModel) -> tuple[dict[str, dict], dict[str, list[Image.Image]]]:
    """The measures and strips of the world's own renders, and of these after the VAE: no model here can do better."""
    vae = load_vae(base, torch.float32)
    models: dict[str, Generate] = {
        RENDERED: partial(rendered, count=SAMPLES),
        THROUGH_VAE: lambda spec: [through_vae(vae, image) for image in rendered(spec, SAMPLES)],
    }
    named = nouns(TOKENS)
    found = {
        name: measures(generate, named) | {"old_meaning": old_meaning(generate, TOKENS)} for name, generate in models.items()
    }
    return found, {name: strip(generate, named) for name, generate in models.items()}


@torch.no_grad()
def through_vae(vae: AutoencoderKLQwenImage, image: Image.Image) -> Image.Image:
    """The image as the VAE gives it back."""
    pixels = to_pixels(image)[:, :, None] * 2 - 1  # (1, 3, 1, H, W)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0, :, 0]  # (3, H, W)
    values = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy(force=True))


def _job(task: tuple[str, int, str]) -> tuple[str, int, dict, list[Image.Image]]:
    name, seed, source = task
    torch.set_num_threads(1)
    found, images = run_arm(ARMS[name], seed, BaseModel(source, torch.device("cpu"), torch.float32))
    return name, seed, found, images


def main() -> None:
    """Run all arms and seeds, some at a time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = str(build_small_base())
    limits, strips = ceilings(BaseModel(source, torch.device("cpu"), torch.float32))
    results: dict[str, list[dict]] = {name: [found] for name, found in limits.items()}
    tasks = [(name, seed, source) for seed in range(arguments.seeds) for name in arguments.arms]
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for name, seed, found, images in pool.imap(_job, tasks):
            results.setdefault(name, []).append({"seed": seed, **found})
            strips.setdefault(name, images)
            print(f"{time.monotonic() - started:.0f} s: {name}, seed {seed}: {json.dumps(found)}", flush=True)
            arguments.output.mkdir(exist_ok=True)
            record = {"budget": BUDGET, "samples": SAMPLES, "torch": torch.__version__, "results": results}
            (arguments.output / "two-tokens.json").write_text(json.dumps(record, indent=1) + "\n")
            write_table(arguments.output / "study.md", "two-tokens", tables(results))
            sheet(COLUMNS, strips).save(arguments.output / "two-tokens.png")
    print(tables(results))


if __name__ == "__main__":
    main()

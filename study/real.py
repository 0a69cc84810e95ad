"""The study on real photographs and weights: the arms of study/arms.py on a folder of the user's own.

    python -m study.real photos/ --class-word dog

The folder holds images with captions in .txt files, in which <> stands where the subject's name belongs: "<> dog on a beach".
The base model is that of the package (QWEN_IMAGE_MODEL), the metrics are those of study/image_metrics.py. docs/study.md defines
the measures. This has been run with small random models, never at full size.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from placeholder.data.buckets import to_image
from placeholder.data.captions import with_token
from placeholder.data.dataset import Photo, read_dataset
from placeholder.lora.adapter import ADAPTER, without_lora
from placeholder.model.base import BaseModel
from standin.sampler import Sampler
from standin.subject import write_images
from study.arms import ARMS, TOKEN, Arm, prepared, steps_of
from study.image_metrics import CLIP, DINO, ImageMetrics
from study.measures import ALWAYS, GATED, LOW_SCALE, acting, difference, mean
from study.tables import table

PLACES = (
    "in the snow",
    "on a beach",
    "in a city street",
    "on a wooden table",
    "in a garden at night",
    "in front of a mountain",
)
UNRELATED = ("a photo of a red bicycle", "a bowl of fruit on a table", "a portrait of an old man", "a city at night")
QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of the steps: when prior leakage is measured
COLUMNS = {
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "prior_leakage_mean": "prior kept, all of training",
    "prior_leakage_low_scale": "scale 0.5",
    "prior_leakage": "end",
    "class_leak": "class leak",
    "class_change": "class change",
    "drift": "drift",
}


@dataclass(frozen=True)
class Photographs:
    """A user's photographs: their crops, captions with <> for the subject's name, and embeddings."""

    photos: list[Photo]
    class_word: str
    clip: Tensor
    dino: Tensor

    def write_dataset(self, path: Path, trigger: str) -> Path:
        """The first crop of each photograph, with the trigger in the captions."""
        return write_images(path, [(to_image(photo.crops[0]), _named(photo.caption, trigger)) for photo in self.photos])


def read_photographs(folder: Path, class_word: str, resolution: int, metrics: ImageMetrics) -> Photographs:
    """A folder of images with captions. Raises ValueError for a caption that does not say where the subject's name belongs."""
    photos, _ = read_dataset(folder, (resolution,))
    for photo in photos:
        if with_token(photo.caption or "", TOKEN) == (photo.caption or ""):
            raise ValueError(f"the caption of {photo.name} has no <>: write it where the subject's name belongs: '<> dog'")
    images = [to_image(photo.crops[0]) for photo in photos]
    return Photographs(photos, class_word, metrics.clip_images(images), metrics.dino_images(images))


class RealMeasures:
    """The measures of one arm on one training."""

    def __init__(self, arm: Arm, photographs: Photographs, sampler: Sampler, metrics: ImageMetrics, samples: int):
        self.arm, self.photographs, self.sampler, self.metrics, self.samples = arm, photographs, sampler, metrics, samples
        word = photographs.class_word
        self.plain = [f"a photo of a {word} {place}" for place in PLACES]
        self.named = [" ".join(f"a photo of a {arm.trigger} {word} {place}".split()) for place in PLACES]
        self.trigger = [f"a photo of {arm.trigger or f'a {word}'}"]

    def images(self, prompts: list[str] | tuple[str, ...]) -> list[Image.Image]:
        """`samples` images of each prompt."""
        return [image for group in self.sampler.sample_all(prompts, self.samples) for image in group]

    def base(self) -> dict[str, list[Image.Image]]:
        """What the base model draws without the LoRA for the trigger, the class word and other prompts."""
        with without_lora(self.sampler.transformer):
            prompts = {"trigger": self.trigger, "class": self.plain, "other": UNRELATED}
            return {name: self.images(some) for name, some in prompts.items()}

    def prior(self, base: dict[str, list[Image.Image]]) -> float:
        """How alike trained and base model draw the trigger, by DINO, the same noise."""
        return self._alike(self.images(self.trigger), base["trigger"])

    def final(self, base: dict[str, list[Image.Image]]) -> dict[str, float]:
        """All that is measured at the end of a training."""
        named, plain, other = self.images(self.named), self.images(self.plain), self.images(UNRELATED)
        texts = self.metrics.clip_texts(self.plain).repeat_interleave(self.samples, 0)
        clip = self.metrics.clip_images(named)
        found = {
            "clip_i": (clip @ self.photographs.clip.T).mean().item(),
            "dino": self._subject(named),
            "clip_t": (clip * texts).sum(1).mean().item(),
            "prior_leakage": self.prior(base),
            "class_leak": self._subject(plain) - self._subject(base["class"]),
            "class_change": difference([plain], [base["class"]]),
            "drift": difference([other], [base["other"]]),
        }
        self.sampler.transformer.set_adapters(ADAPTER, weights=LOW_SCALE)
        found["prior_leakage_low_scale"] = self.prior(base)
        self.sampler.transformer.set_adapters(ADAPTER, weights=1.0)
        return found

    def _subject(self, images: list[Image.Image]) -> float:
        return (self.metrics.dino_images(images) @ self.photographs.dino.T).mean().item()

    def _alike(self, images: list[Image.Image], others: list[Image.Image]) -> float:
        return (self.metrics.dino_images(images) * self.metrics.dino_images(others)).sum(1).mean().item()


def run(
    name: str, seed: int, photographs: Photographs, metrics: ImageMetrics, base: BaseModel, options: argparse.Namespace
) -> dict:
    """One training with its measures."""
    arm = ARMS[name]
    config = arm.config(seed, budget(options))
    dataset = photographs.write_dataset(options.output / "data.zip", arm.trigger)
    training, encoder = prepared(arm, dataset, config, base)
    sampler = Sampler(base, training.state.transformer, encoder, training.tokenizer, training.tokens, options.resolution)
    measures = RealMeasures(arm, photographs, sampler, metrics, options.samples)
    of_base = measures.base()
    drawn: dict[str, dict] = {mode: {"prior_leakage_by_step": {}} for mode in (ALWAYS, GATED)}
    seconds, resumed = 0.0, time.monotonic()
    for step in steps_of(arm, training, config):
        if step.number in {round(share * config.steps) for share in QUARTERS}:
            seconds += time.monotonic() - resumed
            for mode, found in drawn.items():
                sampler.acts = acting(mode, arm.trigger)
                found["prior_leakage_by_step"][str(step.number)] = measures.prior(of_base)
            resumed = time.monotonic()
    for mode, found in drawn.items():
        sampler.acts = acting(mode, arm.trigger)
        found |= measures.final(of_base)
        file = f"{name}-{seed}-{mode}.png".replace(" ", "-").replace(",", "")
        measures.images(measures.named[:1])[0].save(options.output / file)
    return {"arm": name, "subject": photographs.class_word, "seed": seed, "drawn": drawn, "seconds": seconds}


def budget(options: argparse.Namespace) -> dict:
    """The options that all arms share."""
    shared = {"steps": options.steps, "rank": options.rank, "learning_rate": options.learning_rate, "batch_size": 1}
    return shared | {"resolution": (options.resolution,), "report": False}


def _named(caption: str | None, trigger: str) -> str:
    return " ".join(with_token(caption or "", trigger).split())


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--class-word", required=True)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="images a prompt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--clip", default=CLIP)
    parser.add_argument("--dino", default=DINO)
    parser.add_argument("--output", type=Path, default=Path("study-output"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run all arms and seeds, one after the other, and write results.json and table.md."""
    options = parsed(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    base = BaseModel.from_environment()
    metrics = ImageMetrics(base.device, options.clip, options.dino)
    photographs = read_photographs(options.folder, options.class_word, options.resolution, metrics)
    runs: list[dict] = []
    for seed in range(options.seeds):
        for name in options.arms:
            runs.append(run(name, seed, photographs, metrics, base, options))
            text = json.dumps({"budget": budget(options), "runs": runs}, indent=1)
            (options.output / "results.json").write_text(text + "\n")
            print(f"{name}, seed {seed}: {runs[-1]['drawn']}", flush=True)
    seconds = {name: mean(run["seconds"] for run in runs if run["arm"] == name) for name in options.arms}
    (options.output / "table.md").write_text(table(runs, seconds, "seconds of training", COLUMNS))


if __name__ == "__main__":
    main()

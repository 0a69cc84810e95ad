"""What `go_fast` with the distilled LoRA costs and keeps, on the small base model alone and with a user's trained archive.

`python -m standin.distil_check` writes docs/go-fast.json and a table of docs/predict.md, which says what is measured.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from checks.docs_tables import write_table
from placeholder.finetune import finetune
from placeholder.generate import ImageGenerator
from placeholder.job import Job
from placeholder.lora.distilled import FAST_VARIABLE, load_fast_lora
from placeholder.model.base import BaseModel
from placeholder.request import Request
from standin.check_base import caption, held_out_scenes, right_shares
from standin.distil import STORED, STUDENT_STEPS
from standin.judge import background_of
from standin.sampler import GUIDANCE
from standin.small_base import CACHE, build_small_base
from standin.world import SIDE
from study.arms import ARMS, BUDGET
from study.measures import SAMPLES
from study.subjects import SUBJECTS, Context

ARM, SUBJECT = ARMS["token, preservation"], SUBJECTS["object"]
PLAIN = Request(prompt="", guidance=GUIDANCE, width=SIDE, height=SIDE, seed=0)
WAYS = {
    f"50 steps, guidance {GUIDANCE:g} (the default)": PLAIN,
    f"20 steps, guidance {GUIDANCE:g}": replace(PLAIN, steps=20),
    f"{STUDENT_STEPS} steps, guidance {GUIDANCE:g}": replace(PLAIN, steps=STUDENT_STEPS),
    f"{STUDENT_STEPS} steps, no guidance": replace(PLAIN, steps=STUDENT_STEPS, guidance=1.0),
    f"go_fast: {STUDENT_STEPS} steps": replace(PLAIN, go_fast=True),
    f"go_fast, {STUDENT_STEPS // 2} steps asked for": replace(PLAIN, go_fast=True, steps=STUDENT_STEPS // 2),
}
TABLE = {
    "base_background": "base: background",
    "base_color": "base: color",
    "base_shape": "base: shape",
    "fidelity_seen": "fidelity, seen",
    "fidelity_unseen": "fidelity, unseen",
    "following": "following",
    "seconds": "core seconds an image",
}


class Timed:
    """A generator that notes how long each image took, in seconds of one core, whatever else the machine did."""

    def __init__(self, generator: ImageGenerator, way: Request, archive: Path | None):
        self.generator, self.way, self.archive = generator, way, archive
        self.seconds: list[float] = []

    def sample(self, prompts: list[str], count: int) -> list[list[Image.Image]]:
        """`count` images of each prompt, the same noise for every prompt."""
        return [[self._image(prompt, seed) for seed in range(count)] for prompt in prompts]

    def _image(self, prompt: str, seed: int) -> Image.Image:
        start = time.process_time()
        image = self.generator.generate(replace(self.way, prompt=prompt, seed=seed), self.archive)
        self.seconds.append(time.process_time() - start)
        return image


def of_the_base(generator: ImageGenerator, way: Request, count: int) -> dict[str, float]:
    """The shares of held-out captions whose images are right, as docs/study.md's check has them."""
    scenes = held_out_scenes(count, seed=7)
    prompts = [caption(scene.things[0], scene.background) for scene in scenes]
    shares = right_shares([images[0] for images in Timed(generator, way, None).sample(prompts, 1)], scenes)
    return {f"base_{name}": share for name, share in shares.items()}


def of_the_subject(generator: ImageGenerator, way: Request, archive: Path) -> dict[str, float]:
    """The study's fidelity and following of a user's archive, and the median time of an image."""
    timed = Timed(generator, way, archive)
    timed.sample([SUBJECT.prompt(ARM.trigger, SUBJECT.seen[0])], 1)  # applies the LoRAs
    timed.seconds.clear()
    seen, unseen = (judged(timed, contexts) for contexts in (SUBJECT.seen, SUBJECT.unseen))
    return {
        "fidelity_seen": statistics.fmean(fidelity for fidelity, _ in seen),
        "fidelity_unseen": statistics.fmean(fidelity for fidelity, _ in unseen),
        "following": statistics.fmean(followed for _, followed in seen + unseen),
        "seconds": statistics.median(timed.seconds),
    }


def judged(timed: Timed, contexts: tuple[Context, ...]) -> list[tuple[float, bool]]:
    """The subject's fidelity, and whether the background is the one asked for, of SAMPLES images in each context."""
    images = timed.sample([SUBJECT.prompt(ARM.trigger, context) for context in contexts], SAMPLES)
    pairs = [(image, context) for group, context in zip(images, contexts, strict=True) for image in group]
    return [(SUBJECT.fidelity(image, context), background_of(image) == context.background) for image, context in pairs]


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means, with the standard deviation over the seeds where there are several; a way a row."""
    lines = ["| drawn with | " + " | ".join(TABLE.values()) + " |", "|" + " --- |" * (len(TABLE) + 1)]
    for way, measures in results.items():
        cells = []
        for name in TABLE:
            values = measures[name]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 and name.startswith("fidelity") else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def trained(base: BaseModel, seed: int) -> Path:
    """The archive of a user's training with this seed, from .cache where it is there."""
    archive = CACHE / f"go-fast-{Path(base.source).name}" / f"{seed}.zip"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        dataset = SUBJECT.write_dataset(archive.with_suffix(".data"), ARM.trigger)
        finetune(Job(dataset, ARM.config(seed), archive), base, lambda line: None)
    return archive


def main() -> None:
    """Train the archives, generate in every way, judge, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--captions", type=int, default=60, help="held-out captions for the base model alone")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="some of them; the others stay as they were found last")
    parser.add_argument("--lora", default=str(STORED), help="none: the ways without it can be tried before it is there")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = BaseModel(str(build_small_base()), torch.device("cpu"), torch.float32)
    os.environ[FAST_VARIABLE] = arguments.lora
    generator = ImageGenerator(base, lambda line: None, load_fast_lora(base, print))
    written = arguments.output / "go-fast.json"
    results = json.loads(written.read_text())["results"] if written.exists() else {}
    for way in arguments.ways:
        shares = of_the_base(generator, WAYS[way], arguments.captions)
        runs = [of_the_subject(generator, WAYS[way], trained(base, seed)) for seed in range(arguments.seeds)]
        results[way] = {name: [value] for name, value in shares.items()}
        results[way] |= {name: [measures[name] for measures in runs] for name in runs[0]}
        print(f"{way}: {results[way]}", flush=True)
    results = {way: results[way] for way in WAYS if way in results}
    record = {
        "budget": BUDGET | {"resolution": [SIDE]},
        "samples": SAMPLES,
        "captions": arguments.captions,
        "torch": torch.__version__,
    }
    arguments.output.mkdir(exist_ok=True)
    written.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    write_table(arguments.output / "predict.md", "go-fast", table(results))
    print(table(results))


if __name__ == "__main__":
    main()

"""What a zero-prior token is worth: the same subject and budget under trigger words and under variants of the token.

`make study` runs it on the small base model and writes docs/study.json, docs/study.png and a table of docs/study.md, which
defines every measure.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

from checks.docs_tables import write_table
from placeholder.config import TrainConfig
from placeholder.distributed import SINGLE_PROCESS
from placeholder.lora.adapter import scale_lora, without_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training.context import Context, Training, schedule
from placeholder.training.diagnostics import diagnose
from placeholder.training.loop import Step, train_steps
from placeholder.training.setup import prepare
from standin.judge import background_of, kind_probabilities, subject_fidelity, to_pixels
from standin.sampler import Sampler
from standin.small_base import build_small_base
from standin.subject import CLASS_WORD, IMAGES_EACH, SEEN_BACKGROUNDS, UNSEEN_BACKGROUNDS, named, write_dataset
from standin.world import RARE_WORD, SUBJECT, TRIGGER

TOKEN = "<zwx>"
VOCABULARY_RMS = 0.02  # standard deviation of the small base's own embedding rows at their start
BUDGET = {"steps": 400, "rank": 8, "learning_rate": 1e-3, "batch_size": 4, "resolution": (64,)}
CHECKPOINTS = (0.25, 0.5, 0.75, 1.0)  # of the steps
LOW_SCALE = 0.5
EARLY = 0.25
FIDELITY_GOAL = 0.6
LABEL_WIDTH = 330  # pixels of the figure
SAMPLES = 6  # images a prompt
UNRELATED = (
    "a photo of a red circle on a blue background",
    "a photo of a green star on a white background",
    "a photo of a flower on a pink background",
    "a photo of a fish on a cyan background",
)


@dataclass(frozen=True)
class Arm:
    """One way to teach the subject: the word it is called by, and what differs from the defaults."""

    trigger: str
    options: dict
    preserve_class: bool = False  # for trigger words, which train() offers no preservation for
    beside_class_word: bool = True
    trained: bool = True

    @property
    def name(self) -> str:
        """What captions and prompts call the subject."""
        return named(self.trigger) if self.beside_class_word else f"a {self.trigger}"


UNPRESERVED = {"prior_preservation": 0.0, "caption_dropout": 0.05}
PRESERVED = {"prior_preservation": 4.0, "prior_preservation_interval": 4, "caption_dropout": 0.0}
ROW_FIRST = {"placeholder_warmup_fraction": 0.25}
FROZEN = {"placeholder_learning_rate": 0.0}
ARMS: dict[str, Arm] = {
    "base model, fresh token": Arm(TOKEN, UNPRESERVED, trained=False),
    "trigger word TOK": Arm(TRIGGER, UNPRESERVED),
    "trigger word TOK, no caption dropout": Arm(TRIGGER, UNPRESERVED | {"caption_dropout": 0.0}),
    "trigger word TOK, preservation": Arm(TRIGGER, PRESERVED, preserve_class=True),
    "trigger word TOK without class word": Arm(TRIGGER, UNPRESERVED, beside_class_word=False),
    "rare word sks": Arm(RARE_WORD, UNPRESERVED),
    "class word alone": Arm("", UNPRESERVED),
    "token": Arm(TOKEN, UNPRESERVED),
    "token, preservation": Arm(TOKEN, PRESERVED),
    "token, preservation of weight 1": Arm(TOKEN, PRESERVED | {"prior_preservation": 1.0}),
    "token, preservation in every step": Arm(TOKEN, PRESERVED | {"prior_preservation_interval": 1, "prior_preservation": 1.0}),
    "token, preservation in every 8th step": Arm(TOKEN, PRESERVED | {"prior_preservation_interval": 8}),
    "token, preservation, caption dropout": Arm(TOKEN, PRESERVED | {"caption_dropout": 0.05}),
    "token, row first": Arm(TOKEN, UNPRESERVED | ROW_FIRST),
    "token, row first, preservation": Arm(TOKEN, PRESERVED | ROW_FIRST),
    "token without class word, preservation": Arm(TOKEN, PRESERVED | {"class_word": CLASS_WORD}, beside_class_word=False),
    "token, row frozen": Arm(TOKEN, UNPRESERVED | FROZEN),
    "token, row frozen, preservation": Arm(TOKEN, PRESERVED | FROZEN),
    "token, vocabulary-sized start": Arm(TOKEN, UNPRESERVED | {"placeholder_init_std": VOCABULARY_RMS}),
    "token, vocabulary-sized start, preservation": Arm(TOKEN, PRESERVED | {"placeholder_init_std": VOCABULARY_RMS}),
}


def prepared(arm: Arm, seed: int, base: BaseModel) -> tuple[TrainConfig, Training, Sampler]:
    """An arm's options, its training before its first step, and a sampler of its transformer."""
    tokens_on = arm.trigger == TOKEN
    config = TrainConfig(
        **(BUDGET | arm.options), seed=seed, train_placeholder_token=tokens_on, placeholder_token=(TOKEN,) if tokens_on else ()
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "data.zip", arm.name)
        training = prepare(dataset, Context(config, base, log=lambda line: None))
    encoder = training.prompt_embeds.text_encoder or load_text_encoder(base)
    if arm.preserve_class:
        preserve_without_token(training, encoder)
    return config, training, Sampler(base, training.state.transformer, encoder, training.tokenizer, training.tokens)


def trained_steps(config: TrainConfig, training: Training) -> Iterator[Step]:
    """The steps of an arm's training; preservation counts for trigger words too."""
    plan = replace(schedule(config), prior_preservation=config.prior_preservation)
    return train_steps(training.state, plan, SINGLE_PROCESS)


def train_arm(arm: Arm, seed: int, base: BaseModel) -> tuple[dict, list[Image.Image]]:
    """One training with its measures and a strip of images."""
    started = time.monotonic()
    config, training, sampler = prepared(arm, seed, base)
    prompts = Prompts(arm)
    with without_lora(training.state.transformer):
        base_class, base_unrelated = sampler.sample_all(prompts.class_word, SAMPLES), sampler.sample_all(UNRELATED, SAMPLES)

    measures: dict = {"fidelity_by_step": {}}
    marks = {round(share * config.steps) for share in CHECKPOINTS}
    steps = trained_steps(config, training) if arm.trained else ()
    training_seconds, resumed = 0.0, time.monotonic()
    for step in steps:
        training_seconds += time.monotonic() - resumed
        if step.number in marks:
            images = sampler.sample_all(prompts.seen, 3)
            measures["fidelity_by_step"][step.number] = mean_fidelity(images, SEEN_BACKGROUNDS)
        if step.number == round(EARLY * config.steps):
            measures["prior_leakage_early"] = old_meaning(sampler.sample_all(prompts.trigger, SAMPLES))
        resumed = time.monotonic()
    measures["training_seconds"] = training_seconds
    measures |= final_measures(sampler, prompts, base_class, base_unrelated)
    if not arm.trained:
        measures["prior_leakage_early"] = measures["prior_leakage"]
    if config.tokens and arm.trained:
        measures |= diagnose(training).meta()
        measures["row_rms"] = training.tokens.rows.detach().square().mean().sqrt().item()
    reached = [step for step, fidelity in measures["fidelity_by_step"].items() if fidelity >= FIDELITY_GOAL]
    measures["steps_to_goal"] = min(reached) if reached else None
    measures["seconds"] = round(time.monotonic() - started, 1)
    return measures, strip(sampler, prompts)


class Prompts:
    """The prompts of one arm."""

    def __init__(self, arm: Arm):
        self.seen = [f"a photo of {arm.name} on a {background} background" for background in SEEN_BACKGROUNDS]
        self.unseen = [f"a photo of {arm.name} on a {background} background" for background in UNSEEN_BACKGROUNDS]
        word = arm.trigger or f"a {CLASS_WORD}"
        self.trigger = [f"a photo of {word} on a {background} background" for background in ("blue", "yellow")]
        self.class_word = [
            f"a photo of a {CLASS_WORD} on a {background} background" for background in ("blue", "green", "yellow", "white")
        ]


def final_measures(sampler: Sampler, prompts: Prompts, base_class: list, base_unrelated: list) -> dict:
    """The measures at the end of training; docs/study.md defines each."""
    seen, unseen = sampler.sample_all(prompts.seen, SAMPLES), sampler.sample_all(prompts.unseen, SAMPLES)
    class_word, unrelated = sampler.sample_all(prompts.class_word, SAMPLES), sampler.sample_all(UNRELATED, SAMPLES)
    measures = {
        "fidelity_seen": mean_fidelity(seen, SEEN_BACKGROUNDS),
        "fidelity_unseen": mean_fidelity(unseen, UNSEEN_BACKGROUNDS),
        "following": mean(
            background_of(image) == background
            for images, background in zip(seen + unseen, SEEN_BACKGROUNDS + UNSEEN_BACKGROUNDS, strict=True)
            for image in images
        ),
        "prior_leakage": old_meaning(sampler.sample_all(prompts.trigger, SAMPLES)),
        "class_leak": probability(SUBJECT, class_word) - probability(SUBJECT, base_class),
        "class_kept": probability(CLASS_WORD, class_word),
        "class_change": difference(class_word, base_class),
        "drift": difference(unrelated, base_unrelated),
    }
    scale_lora(sampler.transformer, LOW_SCALE)
    measures["prior_leakage_low_scale"] = old_meaning(sampler.sample_all(prompts.trigger, SAMPLES))
    scale_lora(sampler.transformer, 1.0)
    return measures


def preserve_without_token(training: Training, encoder: nn.Module) -> None:
    """Preservation for a trigger word: the same prompts as for the token are kept."""
    captions = [f"a photo of a {CLASS_WORD} on a {background} background" for background in SEEN_BACKGROUNDS * IMAGES_EACH]
    ids = [prompt_ids(training.tokenizer, training.tokens, caption) for caption in captions]
    training.prompt_embeds.text_encoder = encoder
    training.prompt_embeds.cache(ids)
    batches = training.state.sampler
    batches.examples = [
        replace(example, preserved=(class_ids, batches.empty_ids))
        for example, class_ids in zip(batches.examples, ids, strict=True)
    ]


def mean_fidelity(images: list[list[Image.Image]], backgrounds: tuple[str, ...]) -> float:
    """The subject's fidelity averaged over the images of each background."""
    return mean(
        subject_fidelity(image, background) for group, background in zip(images, backgrounds, strict=True) for image in group
    )


def old_meaning(images: list[list[Image.Image]]) -> float:
    """The mean probability that an image shows what a trigger word meant before: a waffle or an arrow."""
    return probability(TRIGGER, images) + probability(RARE_WORD, images)


def probability(kind: str, images: list[list[Image.Image]]) -> float:
    """The mean probability of a kind."""
    return mean(kind_probabilities([image for group in images for image in group])[kind])


def difference(images: list[list[Image.Image]], others: list[list[Image.Image]]) -> float:
    """The mean absolute difference of pixels, 0 to 1, between images of the same prompt and seed."""
    pairs = [pair for group, other in zip(images, others, strict=True) for pair in zip(group, other, strict=True)]
    return mean((to_pixels(a) - to_pixels(b)).abs().mean().item() for a, b in pairs)


def mean(values) -> float:
    """The mean as a plain number."""
    return float(statistics.fmean(map(float, values)))


def strip(sampler: Sampler, prompts: Prompts) -> list[Image.Image]:
    """Two seen and two unseen contexts, the trigger at low scale, the class word twice, two unrelated prompts."""
    images = [sampler.sample(prompt, 1)[0] for prompt in (*prompts.seen[:2], *prompts.unseen[:2])]
    scale_lora(sampler.transformer, LOW_SCALE)
    images.append(sampler.sample(prompts.trigger[1], 1)[0])
    scale_lora(sampler.transformer, 1.0)
    return images + [sampler.sample(prompt, 1)[0] for prompt in (*prompts.class_word[:2], *UNRELATED[:2])]


COLUMNS = ("seen", "seen", "unseen", "unseen", f"trigger at {LOW_SCALE}", "class word", "class word", "unrelated", "unrelated")
TABLE = {
    "fidelity_seen": "fidelity, seen",
    "fidelity_unseen": "fidelity, unseen",
    "prior_leakage_early": "prior leakage, early",
    "prior_leakage_low_scale": f"prior leakage, scale {LOW_SCALE}",
    "prior_leakage": "prior leakage, end",
    "class_leak": "class leak",
    "class_kept": "class kept",
    "class_change": "class change",
    "drift": "drift",
    "following": "following",
    "steps_to_goal": f"steps to fidelity {FIDELITY_GOAL}",
    "training_seconds": "seconds of training",
}


def table(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over the seeds, an arm a row."""
    lines = ["| arm | " + " | ".join(TABLE.values()) + " |", "|" + " --- |" * (len(TABLE) + 1)]
    for name, runs in results.items():
        cells = []
        for measure in TABLE:
            values = [run[measure] for run in runs]
            if None in values:
                cells.append("not reached")
                continue
            digits = 2 if statistics.fmean(values) < 5 else 0
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(strips: dict[str, list[Image.Image]], cell: int = 96) -> Image.Image:
    """The strips of one seed under each other."""
    sheet = Image.new("RGB", (LABEL_WIDTH + len(COLUMNS) * cell, 24 + len(strips) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        pen.text((LABEL_WIDTH + 4 + column * cell, 6), title, fill="black")
    for row, (name, images) in enumerate(strips.items()):
        pen.text((6, 24 + row * cell + cell // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            sheet.paste(
                image.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (LABEL_WIDTH + column * cell, 24 + row * cell)
            )
    return sheet


def _job(task: tuple[str, int, str]) -> tuple[str, int, dict, list[Image.Image]]:
    name, seed, source = task
    torch.set_num_threads(1)
    base = BaseModel(source, torch.device("cpu"), torch.float32)
    measures, images = train_arm(ARMS[name], seed, base)
    return name, seed, measures, images


def main() -> None:
    """Run all arms and seeds, two at a time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    source = str(build_small_base())
    tasks = [(name, seed, source) for seed in range(arguments.seeds) for name in arguments.arms]
    results: dict[str, list[dict]] = {name: [] for name in arguments.arms}
    strips: dict[str, list[Image.Image]] = {}
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for name, seed, measures, images in pool.imap(_job, tasks):
            results[name].append({"seed": seed, **measures})
            strips.setdefault(name, images)
            figures = ", ".join(f"{title} {measures[key]}" for key, title in TABLE.items())
            print(f"{time.monotonic() - started:.0f} s: {name}, seed {seed}: {figures}", flush=True)
            arguments.output.mkdir(exist_ok=True)
            done = {arm: runs for arm, runs in results.items() if runs}
            record = {"budget": BUDGET, "samples": SAMPLES, "torch": torch.__version__, "results": done}
            (arguments.output / "study.json").write_text(json.dumps(record, indent=1) + "\n")
            write_table(arguments.output / "study.md", "study", table(done))
            figure(strips).save(arguments.output / "study.png")
    print(table(results))


if __name__ == "__main__":
    main()

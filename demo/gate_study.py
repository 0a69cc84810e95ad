"""What the token gate is worth: the study's subject and budget, drawn with the LoRA in every pass, in some, or gated.

`make gate-study` runs it on the small base model and writes docs/gate.json, docs/gate.png and a table of docs/study.md, which
defines every measure.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from checks.docs_tables import write_table
from demo.study import (
    BUDGET,
    EARLY,
    PRESERVED,
    SAMPLES,
    TOKEN,
    UNPRESERVED,
    UNRELATED,
    Arm,
    Prompts,
    final_measures,
    mean,
    old_meaning,
    prepared,
    trained_steps,
)
from placeholder.lora.adapter import without_lora
from placeholder.model.base import BaseModel
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT
from standin.judge import half_fidelity
from standin.sampler import Sampler
from standin.small_base import build_small_base
from standin.subject import CLASS_WORD
from standin.world import SUBJECT, TRIGGER

EVERY, CONDITIONAL, GATED = "every pass", "not in the unconditional pass", "gated"
NEIGHBOURS = {"neighbour_class": f"a small {CLASS_WORD}", "neighbour_other": "a small red circle"}
NEIGHBOUR_BACKGROUNDS = ("blue", "yellow")
TRIGGERS, DROPOUTS = {"TOK": TRIGGER, "token": TOKEN}, (0.0, 0.05)
ARMS = {
    f"{name}{', preservation' if preserved else ''}{', caption dropout' if dropout else ''}": Arm(
        trigger,
        (PRESERVED if preserved else UNPRESERVED) | {"caption_dropout": dropout},
        preserve_class=preserved and trigger != TOKEN,
    )
    for name, trigger in TRIGGERS.items()
    for preserved in (False, True)
    for dropout in DROPOUTS
}


@dataclass(frozen=True)
class Task:
    """One training of the study."""

    arm: str
    seed: int
    source: str  # the base model's folder


def acting(mode: str, trigger: str) -> Callable[[str], bool] | None:
    """For which prompts the LoRA acts; a trigger word is told by its letters, as no id tells it."""
    if mode == EVERY:
        return None
    return (lambda prompt: trigger in prompt) if mode == GATED else (lambda prompt: prompt != EMPTY_PROMPT)


def run(task: Task) -> tuple[Task, dict[str, dict], dict[str, list[Image.Image]]]:
    """One training: its measures and some images, by the way of drawing."""
    torch.set_num_threads(1)
    arm = ARMS[task.arm]
    base = BaseModel(task.source, torch.device("cpu"), torch.float32)
    config, training, sampler = prepared(arm, task.seed, base)
    prompts, found, images = Prompts(arm), {EVERY: {}, CONDITIONAL: {}, GATED: {}}, {}
    with without_lora(training.state.transformer):
        base_class, base_unrelated = sampler.sample_all(prompts.class_word, SAMPLES), sampler.sample_all(UNRELATED, SAMPLES)
        images["base model"] = strip(sampler, prompts)
    started, sampling = time.monotonic(), 0.0
    for step in trained_steps(config, training):
        if step.number == round(EARLY * config.steps):
            before = time.monotonic()
            for mode in found:
                sampler.acts = acting(mode, arm.trigger)
                found[mode]["prior_leakage_early"] = old_meaning(sampler.sample_all(prompts.trigger, SAMPLES))
            sampling = time.monotonic() - before
    seconds = time.monotonic() - started - sampling
    for mode, measures in found.items():
        sampler.acts = acting(mode, arm.trigger)
        measures |= final_measures(sampler, prompts, base_class, base_unrelated) | neighbours(sampler, arm)
        measures["training_seconds"] = seconds
        images[mode] = strip(sampler, prompts)
    return task, found, images


def neighbours(sampler: Sampler, arm: Arm) -> dict[str, float]:
    """The subject's fidelity where it does not belong: on the right half, where the class or another thing is asked for."""
    found = {}
    for name, neighbour in NEIGHBOURS.items():
        values = []
        for background in NEIGHBOUR_BACKGROUNDS:
            prompt = f"a photo of a small {arm.trigger} {CLASS_WORD} and {neighbour} on a {background} background"
            values += [half_fidelity(image, background, "right", SUBJECT) for image in sampler.sample(prompt, SAMPLES)]
        found[name] = mean(values)
    return found


def floor(source: str) -> dict[str, float]:
    """The neighbour measures of the base model with a new token: how much any two small things look like the subject."""
    torch.set_num_threads(1)
    _, training, sampler = prepared(ARMS["token"], 0, BaseModel(source, torch.device("cpu"), torch.float32))
    with without_lora(training.state.transformer):
        return neighbours(sampler, ARMS["token"])


def strip(sampler: Sampler, prompts: Prompts) -> list[Image.Image]:
    """A seen and an unseen context, the class word twice, another prompt."""
    shown = (prompts.seen[1], prompts.unseen[1], *prompts.class_word[:2], UNRELATED[0])
    return [sampler.sample(prompt, 1)[0] for prompt in shown]


COLUMNS = ("subject, seen", "subject, unseen", "class word", "class word", "other prompt")
TABLE = {
    "fidelity_seen": "fidelity, seen",
    "fidelity_unseen": "fidelity, unseen",
    "prior_leakage_early": "prior leakage, early",
    "prior_leakage_low_scale": "scale 0.5",
    "prior_leakage": "end",
    "class_leak": "class leak",
    "class_kept": "class kept",
    "class_change": "class change",
    "drift": "drift",
    "neighbour_class": "neighbour leak, class",
    "neighbour_other": "other",
    "training_seconds": "seconds of training",
}


def table(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over the seeds, a row for each arm and way of drawing."""
    lines = ["| trained | LoRA acts | " + " | ".join(TABLE.values()) + " |", "|" + " --- |" * (len(TABLE) + 2)]
    for name, runs in results.items():
        for mode in (EVERY, CONDITIONAL, GATED):
            cells = []
            for measure in TABLE:
                values = [run["drawn"][mode][measure] for run in runs]
                digits = 0 if measure == "training_seconds" else 2
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


ROWS = {
    "base model": ("token", "base model"),
    "TOK, as other tools draw it": ("TOK, caption dropout", EVERY),
    "<zwx>, as other tools draw it": ("token", EVERY),
    "<zwx>, with the token gate": ("token", GATED),
}


def figure(strips: dict[str, dict[str, list[Image.Image]]], cell: int = 150, label: int = 260) -> Image.Image:
    """The rows of one seed that say what the gate does."""
    sheet = Image.new("RGB", (label + len(COLUMNS) * cell, 26 + len(ROWS) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        pen.text((label + 4 + column * cell, 5), title, fill="black", font_size=14)
    for row, (title, (arm, mode)) in enumerate(ROWS.items()):
        pen.text((6, 26 + row * cell + cell // 2 - 8), title, fill="black", font_size=15)
        for column, image in enumerate(strips[arm][mode]):
            larger = image.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            sheet.paste(larger, (label + column * cell, 26 + row * cell))
    return sheet


def main() -> None:
    """Run all arms and seeds, two at a time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    source = str(build_small_base())
    tasks = [Task(name, seed, source) for seed in range(arguments.seeds) for name in arguments.arms]
    results: dict[str, list[dict]] = {name: [] for name in arguments.arms}
    base_model = floor(source)
    strips: dict[str, dict[str, list[Image.Image]]] = {}
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for task, drawn, images in pool.imap(run, tasks):
            results[task.arm].append({"seed": task.seed, "drawn": drawn})
            strips.setdefault(task.arm, images)
            print(f"{time.monotonic() - started:.0f} s: {task.arm}, seed {task.seed}: {json.dumps(drawn)}", flush=True)
            done = {arm: runs for arm, runs in results.items() if runs}
            record = {"budget": BUDGET, "samples": SAMPLES, "torch": torch.__version__, "base_model": base_model}
            text = json.dumps(record | {"results": done}, indent=1)
            (arguments.output / "gate.json").write_text(text + "\n")
            write_table(arguments.output / "study.md", "gate", table(done))
            if {arm for arm, _ in ROWS.values()} <= strips.keys():
                figure(strips).save(arguments.output / "gate.png")
    print(table(results))


if __name__ == "__main__":
    main()

"""What a zero-prior token is worth: three subjects taught under trigger words and under variants of the token.

`make study` runs it on the small base model, two trainings at a time, and writes docs/study.json, docs/study.png and tables of
docs/study.md, which defines every measure. A study that was stopped goes on from docs/study.json.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from checks.docs_tables import write_table
from placeholder.lora.adapter import without_lora
from placeholder.model.base import BaseModel
from standin import judge
from standin.small_base import TRAINED, build_small_base
from study.arms import ARMS, BUDGET, REFERENCE, STEPS, VARIANTS, on_the_small_base, step_flops, steps_of
from study.measures import ALWAYS, GATED, SAMPLES, Measures
from study.subjects import SUBJECTS
from study.tables import comparison, figure, table

SEEDS = 5
MARKS = tuple(round(share * STEPS) for share in (0.25, 0.5, 0.75, 1.0))  # the steps at which prior leakage is measured
DOCS = Path(__file__).parents[1] / "docs"
Strips = dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Task:
    """One training of the study. `equal_flops`: the step by which it has had the FLOPs of a whole training of REFERENCE."""

    arm: str
    subject: str
    seed: int
    source: str  # the base model's folder
    equal_flops: int


def run(task: Task) -> tuple[Task, dict, Strips]:
    """One training: its measures by the way of drawing, and for the first seed a strip of images for each."""
    torch.set_num_threads(1)
    started = time.monotonic()
    arm, subject = ARMS[task.arm], SUBJECTS[task.subject]
    base = BaseModel(task.source, torch.device("cpu"), torch.float32)
    training, sampler = on_the_small_base(arm, subject, task.seed, base)
    measures = Measures(arm, subject, sampler)
    with without_lora(training.state.transformer):
        base_class, base_unrelated = measures.unnamed()
        before = {"prior_leakage": measures.prior_leakage()} | measures.neighbors()
    drawn: dict[str, dict] = {ALWAYS: {"prior_leakage_by_step": {}}, GATED: {"prior_leakage_by_step": {}}}
    for step in steps_of(arm, training, arm.config(task.seed)):
        for mode, found in drawn.items():
            measures.draw_as(mode)
            if step.number in MARKS[:-1]:
                found["prior_leakage_by_step"][str(step.number)] = measures.prior_leakage()
            if step.number == task.equal_flops < STEPS:
                contexts = {"seen": subject.seen, "unseen": subject.unseen}
                found |= {f"fidelity_{name}_equal_flops": measures.fidelity(some)[0] for name, some in contexts.items()}
    strips = {}
    for mode, found in drawn.items():
        measures.draw_as(mode)
        drawn[mode] = measures.final(base_class, base_unrelated) | found
        drawn[mode]["prior_leakage_by_step"][str(STEPS)] = drawn[mode]["prior_leakage"]
        strips |= {mode: measures.strip()} if task.seed == 0 else {}
        for name in ("seen", "unseen"):
            drawn[mode].setdefault(f"fidelity_{name}_equal_flops", drawn[mode][f"fidelity_{name}"])
    return task, {"before": before, "drawn": drawn, "seconds": round(time.monotonic() - started, 1)}, strips


class Results:
    """The study so far, in a file: the FLOPs of a step, and the runs by arm, subject and seed.

    One that was `made_with` another base model or classifier, by their digests, is begun anew.
    """

    def __init__(self, path: Path, made_with: dict[str, str]):
        self.path = path
        self.record = {"budget": BUDGET | {"resolution": list(BUDGET["resolution"])}, "samples": SAMPLES} | made_with
        self.flops: dict[str, float] = {}
        self.runs: list[dict] = []
        stored = json.loads(path.read_text()) if path.exists() else {}
        if self.record.items() <= stored.items():
            self.flops, self.runs = stored["flops"], stored["runs"]

    def lacks(self, task: Task) -> bool:
        """Whether the task has not been run."""
        return (task.arm, task.subject, task.seed) not in {(run["arm"], run["subject"], run["seed"]) for run in self.runs}

    def add(self, task: Task, found: dict) -> None:
        """Keep what a task found, in the file too."""
        self.runs.append({"arm": task.arm, "subject": task.subject, "seed": task.seed, **found})
        text = json.dumps(self.record | {"torch": torch.__version__, "flops": self.flops, "runs": self.runs}, indent=1)
        self.path.write_text(text + "\n")


def tasks(arms: list[str], seeds: int, source: str, flops: dict[str, float]) -> list[Task]:
    """All trainings, seed by seed; VARIANTS are of the first subject alone."""
    equal = {name: min(STEPS, round(STEPS * flops[REFERENCE] / flops[name])) for name in arms}
    first = next(iter(SUBJECTS))
    return [
        Task(arm, subject, seed, source, equal[arm])
        for seed in range(seeds)
        for subject in SUBJECTS
        for arm in arms
        if subject == first or arm not in VARIANTS
    ]


def main() -> None:
    """Run what has not been run yet, two at a time, and write the results after each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=DOCS)
    arguments = parser.parse_args()
    arguments.output.mkdir(exist_ok=True)
    source = str(build_small_base())
    weights = {"base": TRAINED, "judge": judge.WEIGHTS}
    made_with = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in weights.items()}
    results = Results(arguments.output / "study.json", made_with)
    torch.set_num_threads(1)
    base = BaseModel(source, torch.device("cpu"), torch.float32)
    for name in {REFERENCE, *arguments.arms} - results.flops.keys():
        results.flops[name] = step_flops(ARMS[name], SUBJECTS["object"], base)
    missing = [task for task in tasks(arguments.arms, arguments.seeds, source, results.flops) if results.lacks(task)]
    strips: dict[tuple[str, str, str], list[Image.Image]] = {}
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for task, found, images in pool.imap(run, missing):
            results.add(task, found)
            if images:
                strips |= {(task.subject, task.arm, mode): images[mode] for mode in images}
                figure(strips).save(arguments.output / "study.png")
            print(f"{time.monotonic() - started:.0f} s: {task.arm}, {task.subject}, seed {task.seed}: {found}", flush=True)
    cost = {name: flops / results.flops[REFERENCE] for name, flops in results.flops.items()}
    runs = [found for found in results.runs if found["seed"] < arguments.seeds]
    write_table(arguments.output / "study.md", "study", table(runs, cost))
    write_table(arguments.output / "study.md", "comparison", comparison(runs))


if __name__ == "__main__":
    main()

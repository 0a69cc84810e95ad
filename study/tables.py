"""Tables and figure of the study: means over subjects and seeds with 95 % intervals by bootstrap."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from study.arms import ARMS, OURS, REFERENCE
from study.measures import ALWAYS, GATED

RESAMPLES = 10_000
COLUMNS = {
    "fidelity_seen": "fidelity, seen",
    "fidelity_unseen": "unseen",
    "fidelity_seen_equal_flops": "at TOK's FLOPs, seen",
    "fidelity_unseen_equal_flops": "unseen",
    "following": "following",
    "prior_leakage_mean": "prior leakage, all of training",
    "prior_leakage_low_scale": "scale 0.5",
    "prior_leakage": "end",
    "class_leak": "class leak",
    "class_kept": "class kept",
    "class_change": "class change",
    "drift": "drift",
    "neighbor_class": "neighbor leak, class",
    "neighbor_other": "other",
}
LABEL, CELL, HEADER = 230, 100, 36  # pixels of a sheet
TITLES = ("seen", "unseen", "name alone", "class word", "other prompt")  # of Measures.strip
SHOWN = ((REFERENCE, ALWAYS), (REFERENCE, GATED), (OURS, ALWAYS), (OURS, GATED))


def grid(runs: list[dict], arm: str, value: Callable[[dict], float | None]) -> np.ndarray:
    """A value of an arm's runs by subject and seed, (S, K); NaN where there is none."""
    of_arm = {(run["subject"], run["seed"]): value(run) for run in runs if run["arm"] == arm}
    subjects, seeds = (sorted({key[i] for key in of_arm}) for i in (0, 1))
    found = np.array([[of_arm.get((subject, seed)) for seed in seeds] for subject in subjects], dtype=float)
    return found[~np.isnan(found).all(axis=1)] if found.size else found


def measure(mode: str, name: str) -> Callable[[dict], float | None]:
    """A measure of a run as one way of drawing has it."""
    if name == "prior_leakage_mean":
        return lambda run: _mean(run["drawn"][mode]["prior_leakage_by_step"].values())
    return lambda run: run["drawn"][mode].get(name)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values (S, K): subjects and seeds are drawn anew, each with replacement."""
    rng, (subjects, seeds) = np.random.default_rng(0), values.shape
    rows = rng.integers(subjects, size=(RESAMPLES, subjects, 1))
    columns = rng.integers(seeds, size=(RESAMPLES, 1, seeds))
    low, high = np.nanpercentile(np.nanmean(values[rows, columns], axis=(1, 2)), (2.5, 97.5))
    return float(low), float(high)


def cell(values: np.ndarray) -> str:
    """Mean and interval in words."""
    if not values.size:
        return ""
    low, high = interval(values)
    return f"{np.nanmean(values):.2f} ({low:.2f} to {high:.2f})"


def table(runs: list[dict], cost: dict[str, float], unit: str = "FLOPs of a step", columns: dict[str, str] = COLUMNS) -> str:
    """A row for each arm and way of drawing, with its cost."""
    head = ["trained", "LoRA acts", unit, *columns.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for arm in (name for name in ARMS if any(run["arm"] == name for run in runs)):
        for mode in (ALWAYS, GATED):
            cells = [cell(grid(runs, arm, measure(mode, name))) for name in columns]
            lines.append(f"| {arm} | {mode} | {cost[arm]:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def comparison(runs: list[dict]) -> str:
    """The token with the gate less TOK, drawn always and gated: paired by subject and seed."""
    lines = [
        f"| measure | {OURS}, gated | {REFERENCE}, always | difference | {REFERENCE}, gated | difference |",
        "|" + " --- |" * 6,
    ]
    for name, title in COLUMNS.items():
        ours = grid(runs, OURS, measure(GATED, name))
        cells = [cell(ours)]
        for mode in (ALWAYS, GATED):
            other = grid(runs, REFERENCE, measure(mode, name))
            cells += [f"{np.nanmean(other):.2f}" if other.size else "", cell(ours - other) if ours.shape == other.shape else ""]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(strips: dict[tuple[str, str, str], list[Image.Image]]) -> Image.Image:
    """For each subject a row for each of SHOWN, with the images of Measures.strip."""
    rows = sorted((key for key in strips if key[1:] in SHOWN), key=lambda key: (key[0], SHOWN.index(key[1:])))
    return sheet(TITLES, {"{}: {}, {}".format(*key).replace("object", "house"): strips[key] for key in rows})


def sheet(titles: Sequence[str], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of images under each other, with their names and the titles of the columns."""
    image = Image.new("RGB", (LABEL + len(titles) * CELL, HEADER + len(rows) * CELL), "white")
    pen = ImageDraw.Draw(image)
    for column, title in enumerate(titles):
        pen.text((LABEL + 4 + column * CELL, 10), title, fill="black")
    for row, (name, images) in enumerate(rows.items()):
        top = HEADER + row * CELL
        pen.text((6, top + CELL // 2 - 8), name, fill="black", font_size=14)
        for column, cell in enumerate(images):
            image.paste(cell.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS), (LABEL + column * CELL, top))
    return image

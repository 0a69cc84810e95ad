"""The results of two tokens in one training as tables, and the images of its contact sheet."""

import operator
import statistics
from functools import reduce

from PIL import Image

from study.two_measures import CONTEXTS, NAMES, Generate
from study.two_subjects import CLASS_WORDS, KINDS, ORDERS, alone, both, side_by_side

# Each column of a table is a title and where the figure stands in the record of a run.
Columns = dict[str, tuple[str, ...]]
ALONE: Columns = {
    f"{name}, {title}": ("alone", name, context, key)
    for name in NAMES
    for title, context, key in (
        ("seen", "seen", "own"),
        ("unseen", "unseen", "own"),
        ("the other, seen", "seen", "other"),
        ("the other, unseen", "unseen", "other"),
    )
}
BOTH: Columns = {
    f"{title}, {context}": ("both", context, key)
    for context in CONTEXTS
    for title, key in (
        ("first", "first"),
        ("second", "second"),
        ("worse of the two", "worse"),
        ("wrong one", "other"),
        ("both drawn", "both_drawn"),
    )
}
CLASSES: Columns = {
    f"{title}, {name}": (group, name, key)
    for name in NAMES
    for title, group, key in (
        ("class leak", "class_word", "leak"),
        ("class kept", "class_word", "kept"),
        ("named alone of two", "one_named", "own"),
        ("the other beside it", "one_named", "leak"),
    )
} | {"drift": ("drift",)}
OLD: Columns = {
    f"{title}, {name}": (key, name)
    for name in NAMES
    for title, key in (("at scale 0.5", "old_meaning_low_scale"), ("at the end", "old_meaning"))
}


def tables(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over the seeds, an arm a row, in four tables."""
    titles = {"alone": ALONE, "both in one picture": BOTH, "class words": CLASSES, "old meaning": OLD}
    return "\n".join(_table(title, columns, results) for title, columns in titles.items())


def _table(title: str, columns: Columns, results: dict[str, list[dict]]) -> str:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for arm, runs in results.items():
        lines.append(f"| {arm} | " + " | ".join(_cell(runs, path) for path in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict], path: tuple[str, ...]) -> str:
    if any(path[0] not in run for run in runs):
        return ""
    found = [float(reduce(operator.getitem, path, run)) for run in runs]
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.2f}{spread}"


COLUMNS = (
    *("first, seen", "first, unseen", "second, seen", "second, unseen"),
    *("both, seen", "both, seen", "both, seen", "both, unseen", "both, unseen", "both, unseen"),
    *("first + face", "second + house", "house", "face"),
)


def strip(generate: Generate, named: tuple[str, str]) -> list[Image.Image]:
    """The first image for each of COLUMNS, of a model that calls the subjects `named`."""
    first_left, second_left = ORDERS
    specs = [alone(named[index], KINDS[index], background) for index in (0, 1) for background in ("blue", "white")]
    pairs = (("blue", first_left), ("green", second_left), ("pink", first_left))
    specs += [both(named, order, background) for background, order in pairs]
    pairs = (("white", first_left), ("yellow", second_left), ("orange", first_left))
    specs += [both(named, order, background) for background, order in pairs]
    for index in (0, 1):
        plain = CLASS_WORDS[1 - index]
        specs.append(side_by_side((named[index], plain), (KINDS[index], plain), "blue"))
    specs += [alone(word, word, "blue") for word in CLASS_WORDS]
    return [generate(spec)[0] for spec in specs]

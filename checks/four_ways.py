"""Compares the images of one archive in four ways: conditioning, LoRA, latents, pixels, and how much of the subject is there.

    python -m checks.four_ways FOLDER

FOLDER is what checks/four_ways_ours.py and checks/four_ways_comfyui.py wrote. Writes docs/four-ways.json, a table of
docs/study.md and demo-output/four-ways.png; fails where conditioning or LoRA differ from those of predict.py by more than
TOLERANCE.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from checks.docs_tables import write_table
from checks.four_ways_ours import BACKGROUNDS, PROMPTS
from demo.run import IMAGE, OUTPUT
from demo.server import ROOT
from placeholder.lora.adapter import A, B
from placeholder.report.charts import image_grid
from standin import subject
from standin.judge import background_of, kind_probabilities, subject_fidelity
from standin.world import SUBJECT
from study.measures import mean

TOLERANCE = 1e-5
OURS, BASE = "predict.py", "base model"
FOUR = (OURS, "diffusers", "command line", "ComfyUI")
WAYS = (BASE, *FOUR, "ComfyUI, workflow.json")
SHOWN = (0, 2, 6, 7, 9, 10)  # prompts of the contact sheet
SEEN = len(subject.SEEN_BACKGROUNDS)
MEASURES = {
    "conditioning": "conditioning",
    "lora": "LoRA",
    "latents": "latents",
    "pixels": "pixels: most",
    "mean_pixels": "mean",
    "fidelity_seen": "fidelity: seen",
    "fidelity_unseen": "unseen",
    "subject_shown": "subject: token",
    "subject_for_class_word": "class word",
    "following": "background",
}

Record = dict[str, Tensor]


def largest(ours: Record, theirs: Record, prefix: str) -> float:
    """The largest absolute difference of all tensors whose name begins so; both have to hold the same."""
    names = {name for name in ours if name.startswith(prefix)}
    assert names and names == {name for name in theirs if name.startswith(prefix)}, f"not the same {prefix}"
    for name in names:
        assert ours[name].shape == theirs[name].shape, (name, ours[name].shape, theirs[name].shape)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in names)


def differences(ours: Record, theirs: Record, std: Tensor) -> dict[str, float]:
    """Between one way and ours: of the embeddings of all prompts, of what the LoRA adds to the weights, of the last latents.

    `std` (16,) is the deviation of the latents, so that theirs are compared as the transformer sees them.
    """
    scaled = [
        {name: value / std.view(1, -1, 1, 1, 1) for name, value in record.items() if name.startswith("latents")}
        for record in (ours, theirs)
    ]
    return {
        "conditioning": max(largest(ours, theirs, "prompt."), largest(ours, theirs, "negative")),
        "lora": largest(ours, theirs, "delta."),
        "latents": largest(*scaled, "latents."),
    }


def pixel_differences(ours: list[Image.Image], theirs: list[Image.Image]) -> dict[str, float]:
    """The largest and the mean difference of two ways' pixels, in levels of 255."""
    found = np.stack([np.abs(np.asarray(a, float) - np.asarray(b, float)) for a, b in zip(ours, theirs, strict=True)])
    return {"pixels": float(found.max()), "mean_pixels": float(found.mean())}


def judged(pictures: list[Image.Image]) -> dict[str, float]:
    """What the images show, by the measures of docs/study.md, one image a prompt."""
    named, class_word = pictures[: len(BACKGROUNDS)], pictures[len(BACKGROUNDS)]
    fidelity = [subject_fidelity(image, background) for image, background in zip(named, BACKGROUNDS, strict=True)]
    return {
        "fidelity_seen": mean(fidelity[:SEEN]),
        "fidelity_unseen": mean(fidelity[SEEN:]),
        "subject_shown": mean(kind_probabilities(named)[SUBJECT]),
        "subject_for_class_word": kind_probabilities([class_word])[SUBJECT][0],
        "following": mean(background_of(image) == wanted for image, wanted in zip(named, BACKGROUNDS, strict=True)),
    }


def from_file(folder: Path) -> Record:
    """B A of every layer of the archive's LoRA, whose alpha is its rank."""
    lora = load_file(folder / "lora_weights.safetensors")
    names = [name.removesuffix(A) for name in lora if name.endswith(A)]
    return {f"delta.{name.removeprefix('transformer.')}": lora[name + B].float() @ lora[name + A].float() for name in names}


def compared(folder: Path, pictures: dict[str, list[Image.Image]]) -> dict:
    """Every figure of docs/four-ways.json."""
    records = {way: load_file(folder / way / "record.safetensors") for way in WAYS}
    std = Tensor(json.loads((folder / "facts.json").read_text())["vae"]["latents_std"])
    ours, ways = records[OURS], {}
    for way in WAYS:
        held = differences(ours, records[way], std) if way not in (OURS, BASE) else {}
        ways[way] = held | pixel_differences(pictures[OURS], pictures[way]) | judged(pictures[way])
    return {
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        | {"comfyui": json.loads((folder / "comfyui.json").read_text())},
        "tolerance": TOLERANCE,
        "picture": IMAGE,
        "prompts": PROMPTS,
        "lora_layers": sum(name.startswith("delta.") for name in ours),
        "lora_against_the_file": largest(ours, from_file(folder), "delta."),
        "largest": {
            prefix: max(float(value.abs().max()) for name, value in ours.items() if name.startswith(prefix))
            for prefix in ("prompt", "delta", "latents")
        },
        "ways": ways,
    }


def table(ways: dict[str, dict]) -> str:
    """The ways under each other; a figure that a way has not is left empty."""

    def cell(name: str, value: float | None) -> str:
        if value is None:
            return ""
        if name in ("conditioning", "lora", "latents"):
            return f"{value:.1e}" if value else "0"
        return f"{value:.0f}" if name == "pixels" else f"{value:.2f}"

    lines = ["| | " + " | ".join(MEASURES.values()) + " |", "|" + " --- |" * (len(MEASURES) + 1)]
    lines += [
        f"| {way} | " + " | ".join(cell(name, found.get(name)) for name in MEASURES) + " |" for way, found in ways.items()
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Compare, write, and fail where the four ways are not one."""
    pictures = {
        way: [Image.open(folder / way / f"{number}.png").convert("RGB") for number in range(len(PROMPTS))] for way in WAYS
    }
    found = compared(folder, pictures)
    columns = {way: [images[number] for number in SHOWN] for way, images in pictures.items()}
    image_grid(columns, [PROMPTS[number] for number in SHOWN]).save(OUTPUT / "four-ways.png", optimize=True)
    print(table(found["ways"]))
    gated = [
        found["lora_against_the_file"],
        *(found["ways"][way][name] for way in FOUR[1:] for name in ("conditioning", "lora")),
    ]
    if max(gated) > TOLERANCE:
        raise SystemExit(f"a difference of {max(gated)} is above {TOLERANCE}")
    (ROOT / "docs" / "four-ways.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_table(ROOT / "docs" / "study.md", "four-ways", table(found["ways"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

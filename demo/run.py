"""The main job end to end on the small base model, through the real Cog server: three trainings, their archives, images.

A new subject is taught with the zero-prior token and with the trigger word TOK, and a cat from real photographs with the
token. The contact sheet shows what was taught and what was drawn; everything is left in demo-output.
"""

import io
import re
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from demo.server import ROOT, CogServer, data_url, from_data_url
from placeholder.lora.distilled import FAST_VARIABLE
from standin import distil, photos, subject
from standin.small_base import build_small_base
from standin.world import TRIGGER, render, subject_scene

OUTPUT = ROOT / "demo-output"
TOKEN = "<zwx>"
BUDGET = {"steps": 400, "rank": 8, "resolution": "64", "learning_rate": 1e-3, "batch_size": 4, "seed": 1}
IMAGE = {"steps": 20, "guidance": 4, "width": 64, "height": 64, "seed": 7, "output_format": "png"}
CELL, TITLE_WIDTH = 112, 190
TITLE = "Drawn by a small stand-in base model (64 pixels, trained on synthetic shapes), not by Qwen-Image."


def main() -> None:
    """Train, generate images, and write a contact sheet."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    env = {"QWEN_IMAGE_MODEL": str(build_small_base().relative_to(ROOT))}
    log = OUTPUT / "server.log"
    with_token, with_word = {"placeholder_token": TOKEN}, {"train_placeholder_token": False}
    trainings = {
        "zero-prior": (
            subject.write_dataset(OUTPUT / "dataset-zero-prior.zip", subject.named(TOKEN)),
            with_token | {"log_prompt_ids": True},
        ),
        "baseline": (subject.write_dataset(OUTPUT / "dataset-baseline.zip", subject.named(TRIGGER)), with_word),
        "photographs": (photos.write_dataset(OUTPUT / "dataset-photographs.zip", TOKEN), with_token | {"steps": 200}),
    }
    archives, logs = {}, {}
    with CogServer("train", env, log) as server:
        for name, (dataset, options) in trainings.items():
            answer = succeeded(server.ask({"dataset": data_url(dataset), **BUDGET, **options}))
            print(f"--- training: {name}\n{answer['logs']}", flush=True)
            logs[name] = answer["logs"]
            archives[name] = OUTPUT / f"weights-{name}.zip"
            archives[name].write_bytes(from_data_url(answer["output"]["weights"]))
    with CogServer("predict", env | {FAST_VARIABLE: str(distil.STORED)}, log) as server:
        rows = picture_rows(server, archives)
    contact_sheet(rows, {name: curves(text) for name, text in logs.items()}).save(OUTPUT / "contact-sheet.png")
    print(f"{TITLE}\nThe contact sheet, the images, the archives, the data sets and the server's log are in {OUTPUT}")


def picture_rows(server: CogServer, archives: dict[str, Path]) -> list[tuple[str, list[Image.Image], list[str]]]:
    """Rows of the contact sheet: a title, images, and the text under each."""

    def draw(archive: str | None, prompts: list[str], go_fast: bool = False) -> tuple[list[Image.Image], list[str]]:
        return [picture(server, prompt, archives[archive] if archive else None, go_fast) for prompt in prompts], prompts

    named, house = subject.named(TOKEN), subject.CLASS_WORD
    seen = [f"a photo of {named} on a {background} background" for background in ("blue", "green", "black", "pink")]
    unseen = [f"a photo of {named} on a {background} background" for background in subject.UNSEEN_BACKGROUNDS]
    unseen.append(f"a photo of {named} on the left on a white background")
    others = [f"a photo of a {house} on a {background} background" for background in ("blue", "white")]
    others += ["a photo of a red circle on a blue background", "a photo of a green star on a white background"]
    trigger = [prompt.replace(TOKEN, TRIGGER) for prompt in seen[:2] + unseen[:2]]
    cat = [f"a photo of {TOKEN}", f"a close portrait of {TOKEN}"]
    taught = [render(subject_scene(background, seed=1000 + i)) for i, background in enumerate(subject.SEEN_BACKGROUNDS[:4])]
    return [
        ("data set, 4 of 12", taught, [f"... {background} background" for background in subject.SEEN_BACKGROUNDS[:4]]),
        ("base model: the token", *draw(None, seen)),
        ("trained token, seen", *draw("zero-prior", seen)),
        ("trained token, unseen", *draw("zero-prior", unseen)),
        ("trained token, go_fast", *draw("zero-prior", seen[:2] + unseen[:2], go_fast=True)),
        ("base model: other words", *draw(None, others)),
        ("trained token: other words", *draw("zero-prior", others)),
        ("base model: TOK", *draw(None, trigger)),
        ("trained TOK, no token", *draw("baseline", trigger)),
        ("trained TOK: other words", *draw("baseline", others)),
        (
            "photographs, data set",
            [image for image, _ in photos.cat_views()[:4]],
            [caption.format(TOKEN) for _, caption in photos.VIEWS[:4]],
        ),
        ("photographs: drawn", *draw("photographs", cat)),
    ]


def picture(server: CogServer, prompt: str, archive: Path | None, go_fast: bool) -> Image.Image:
    """One image from the server, with the archive or without; kept as a file too."""
    weights = {"replicate_weights": data_url(archive)} if archive else {}
    content = from_data_url(succeeded(server.ask({"prompt": prompt, "go_fast": go_fast, **IMAGE, **weights}))["output"])
    name = re.sub(r"[^a-zA-Z]+", "-", f"{archive.stem if archive else 'base'} {prompt}{' go fast' if go_fast else ''}").strip(
        "-"
    )
    (OUTPUT / f"{name}.png").write_bytes(content)
    return Image.open(io.BytesIO(content)).convert("RGB")


def succeeded(answer: dict) -> dict:
    """The answer, unless it is a failure."""
    if answer["status"] != "succeeded":
        raise SystemExit(f"the server answered: {answer.get('error')}")
    return answer


def curves(log: str) -> dict[str, list[float]]:
    """Loss and row norm from the progress lines of a training."""
    return {name: [float(value) for value in re.findall(rf"[ ,]{name}=([0-9.e+-]+)", log)] for name in ("loss", "row norm")}


def contact_sheet(rows: list[tuple[str, list[Image.Image], list[str]]], all_curves: dict[str, dict]) -> Image.Image:
    """The rows with their titles, then a plot of each training's curves, under a line that says what drew them."""
    height = CELL + 16
    sheet = Image.new("RGB", (TITLE_WIDTH + 4 * (CELL + 60), 30 + (len(rows) + len(all_curves)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), TITLE, fill="black")
    for row, (title, images, captions) in enumerate(rows):
        top = 30 + row * height
        pen.text((8, top + CELL // 2), title, fill="black")
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = TITLE_WIDTH + column * (CELL + 60)
            sheet.paste(image.convert("RGB").resize((CELL, CELL)), (left, top))
            pen.text((left, top + CELL + 1), caption.removeprefix("a photo of ").replace(" background", ""), fill="gray")
    for row, (name, found) in enumerate(all_curves.items(), start=len(rows)):
        top = 30 + row * height
        pen.text((8, top + CELL // 2), f"{name}: loss, row norm", fill="black")
        for column, values in enumerate(values for values in found.values() if values):
            plot(pen, values, (TITLE_WIDTH + column * 2 * (CELL + 60), top, 2 * CELL, CELL - 10))
    return sheet


def plot(pen: ImageDraw.ImageDraw, values: list[float], box: tuple[int, int, int, int]) -> None:
    """A line of the values in the box (left, top, width, height), with the first, the last and the range in words."""
    left, top, width, height = box
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = [
        (left + width * i / max(len(values) - 1, 1), top + height * (1 - (value - low) / span))
        for i, value in enumerate(values)
    ]
    pen.rectangle((left, top, left + width, top + height), outline="lightgray")
    pen.line(points, fill="black")
    pen.text((left, top + height + 2), f"{values[0]:.3g} to {values[-1]:.3g} (range {low:.3g} to {high:.3g})", fill="gray")


if __name__ == "__main__":
    main()

"""The main job end to end on the small base model, through the real Cog server: two trainings, their archives, pictures."""

import io
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from demo.photos import cat_views, write_dataset
from demo.server import ROOT, CogServer, data_url, from_data_url
from demo.small_base import build_tiny_base

OUTPUT = ROOT / "demo-output"
STEPS = 200
CELL = 192
TITLE = "Small stand-in base model with random weights: its pictures are noise. This shows that every part works, not quality."


def main() -> None:
    """Train with the token and without, draw with both archives and with the base model, and leave a contact sheet."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    env = {"QWEN_IMAGE_MODEL": str(build_tiny_base(ROOT / ".cache" / "tiny-base").relative_to(ROOT))}
    log = OUTPUT / "server.log"
    common = {"steps": STEPS, "rank": 8, "resolution": "64", "learning_rate": 1e-3, "seed": 1}

    archives = {}
    with CogServer("train", env, log) as server:
        for mode, subject, options in (
            ("zero_prior", "<zwx>", {"placeholder_token": "<zwx>", "log_prompt_ids": True}),
            ("baseline", "TOK", {"train_placeholder_token": False, "default_caption": "a photo of TOK"}),
        ):
            dataset = write_dataset(OUTPUT / f"dataset-{mode}.zip", subject)
            answer = succeeded(server.ask({"dataset": data_url(dataset), **common, **options}))
            print(f"--- training, {mode}\n{answer['logs']}")
            archives[mode] = OUTPUT / f"weights-{mode}.zip"
            archives[mode].write_bytes(from_data_url(answer["output"]["weights"]))

    rows = [("data set", [image for image, _ in cat_views()[:4]])]
    with CogServer("predict", env, log) as server:
        for title, archive, prompts in (
            ("base model", None, ["a photo of <zwx>", "a photo of TOK"]),
            ("zero-prior token", archives["zero_prior"], ["a photo of <zwx>", "<zwx> in a garden", "a garden"]),
            ("baseline, TOK", archives["baseline"], ["a photo of TOK", "TOK in a garden", "a garden"]),
        ):
            rows.append((title, [draw(server, prompt, archive) for prompt in prompts]))
    contact_sheet(rows).save(OUTPUT / "contact-sheet.png")
    print(f"{TITLE}\nThe pictures, the archives, the data sets and the server's log are in {OUTPUT}")


def draw(server: CogServer, prompt: str, archive: Path | None) -> Image.Image:
    """One picture from the server, with the archive or without."""
    inputs = {"prompt": prompt, "steps": 20, "guidance": 4, "width": 128, "height": 128, "seed": 7, "output_format": "png"}
    if archive:
        inputs["replicate_weights"] = data_url(archive)
    picture = from_data_url(succeeded(server.ask(inputs))["output"])
    name = f"{archive.stem if archive else 'base'}-{prompt}".replace(" ", "-").replace("<", "").replace(">", "")
    (OUTPUT / f"{name}.png").write_bytes(picture)
    return Image.open(io.BytesIO(picture))


def succeeded(answer: dict) -> dict:
    """The answer, unless it is a failure."""
    if answer["status"] != "succeeded":
        raise SystemExit(f"the server answered: {answer.get('error')}")
    return answer


def contact_sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """The rows of pictures with their titles, under a line that says what base model drew them."""
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (140 + columns * CELL, 30 + len(rows) * CELL), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), TITLE, fill="black")
    for row, (title, images) in enumerate(rows):
        pen.text((8, 30 + row * CELL + CELL // 2), title, fill="black")
        for column, image in enumerate(images):
            fitted = image.convert("RGB").resize((CELL - 6, CELL - 6))
            sheet.paste(fitted, (140 + column * CELL, 30 + row * CELL))
    return sheet


if __name__ == "__main__":
    main()

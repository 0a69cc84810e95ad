"""The main job end to end on the small base model, through the real Cog server: three trainings, their archives, images.

A new kind of house is taught twice, under the trigger word TOK and under the token <zwx>, and a cat from photographs under the
token. The contact sheet tells it in eight rows; everything is left in demo-output, each training's report in its archive.
"""

import io
import re
import shutil
import zipfile
from pathlib import Path

from PIL import Image

from demo.server import ROOT, CogServer, data_url, from_data_url
from demo.sheet import TITLE, Cell, contact_sheet
from standin import photos
from standin.small_base import build_small_base
from standin.subject import TAUGHT_SEED
from standin.world import SIDE, TRIGGER
from study.subjects import SUBJECTS

OUTPUT = ROOT / "demo-output"
TOKEN = "<zwx>"
STEPS, QUARTER, CAT_STEPS = 480, 120, 280
BUDGET = {"steps": STEPS, "rank": 8, "resolution": str(SIDE), "learning_rate": 1e-3, "batch_size": 4, "seed": 1}
IMAGE = {"steps": 14, "guidance": 4, "width": SIDE, "height": SIDE, "seed": 7, "output_format": "png"}
BEFORE = (
    "a photo of {} on a blue background",
    "a photo of a {} house on a pink background",
    "a photo of a {} house on a white background",
)
SEEN = tuple(f"a photo of a {{}} house on a {background} background" for background in ("blue", "black", "pink"))
UNSEEN = tuple(f"a photo of a {{}} house on a {background} background" for background in ("yellow", "white")) + (
    "a photo of a {} house on the left on an orange background",
)
CLASS = tuple(f"a photo of a house on a {background} background" for background in ("blue", "white"))
OTHERS = ("a photo of a red circle on a blue background", "a photo of a fish on a cyan background")
CAT = ("a photo of {}", "a portrait of {}", "a picture of {}")
WORD, ZERO_PRIOR, PHOTOGRAPHS = "baseline", "zero-prior", "photographs"  # the archives
SOURCES = {None: "base model", WORD: f"LoRA for {TRIGGER}", ZERO_PRIOR: f"LoRA for {TOKEN}", PHOTOGRAPHS: f"LoRA for {TOKEN}"}


def main() -> None:
    """Train, generate images, and write the contact sheet."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    env, log = {"QWEN_IMAGE_MODEL": str(build_small_base().relative_to(ROOT))}, OUTPUT / "server.log"
    with CogServer("train", env, log) as server:
        archives = trained_archives(server)
    with CogServer("predict", env, log) as server:
        contact_sheet(Rows(server, archives).all()).save(OUTPUT / "contact-sheet.png")
    print(f"{TITLE}\nThe contact sheet, the images, the archives, the data sets and the server's log are in {OUTPUT}")


def trained_archives(server: CogServer) -> dict[str, Path]:
    """The archive of each training."""

    def samples(name: str) -> dict:
        return {"sample_every": QUARTER, "sample_prompts": "\n".join(prompt.format(name) for prompt in BEFORE)}

    house, token = SUBJECTS["object"], {"placeholder_token": TOKEN}
    trainings = {
        WORD: (house.write_dataset(OUTPUT / "dataset-baseline.zip", TRIGGER), samples(TRIGGER)),
        ZERO_PRIOR: (house.write_dataset(OUTPUT / "dataset-zero-prior.zip", TOKEN), token | samples(TOKEN)),
        PHOTOGRAPHS: (photos.write_dataset(OUTPUT / "dataset-photographs.zip", TOKEN), token | {"steps": CAT_STEPS}),
    }
    archives = {}
    for name, (data, options) in trainings.items():
        answer = succeeded(server.ask({"dataset": data_url(data), **BUDGET, **options}))
        print(f"--- training: {name}\n{answer['logs']}", flush=True)
        archives[name] = OUTPUT / f"weights-{name}.zip"
        archives[name].write_bytes(from_data_url(answer["output"]["weights"]))
    return archives


class Rows:
    """The rows of the contact sheet, drawn by a server; each image is kept as a file too."""

    def __init__(self, server: CogServer, archives: dict[str, Path]):
        self.server, self.archives = server, archives

    def all(self) -> list[tuple[str, list[Cell]]]:
        """The rows in the order of the argument: a title and six images each."""
        house = SUBJECTS["object"]
        contexts = enumerate(house.seen, TAUGHT_SEED)
        taught = [Cell(house.image(where, seed), "data set", house.prompt(TOKEN, where)) for seed, where in contexts]
        views = [(image, caption) for image, caption in photos.cat_views() if caption][:3]
        cat = [Cell(square(image), "data set", caption.format(TOKEN)) for image, caption in views]
        return [
            (f"What is taught, to one LoRA under {TOKEN} and to another under {TRIGGER}: 6 of 12 images", taught),
            ("Before training: what the names mean", self.named(BEFORE, None, None)),
            ("After a quarter of the steps", self.sampled(WORD, TRIGGER) + self.sampled(ZERO_PRIOR, TOKEN)),
            ("After all steps, backgrounds of the data set", self.named(SEEN, WORD, ZERO_PRIOR)),
            ("After all steps, other backgrounds", self.named(UNSEEN, WORD, ZERO_PRIOR)),
            ("The plain class word: is it as it was?", self.compared(CLASS)),
            ("Other words: are they as they were?", self.compared(OTHERS)),
            (f"A cat from 6 photographs, under {TOKEN}", cat + [self.drawn(p.format(TOKEN), PHOTOGRAPHS) for p in CAT]),
        ]

    def named(self, prompts: tuple[str, ...], word: str | None, token: str | None) -> list[Cell]:
        """The prompts with the trigger word, then with the token, each drawn with its archive."""
        return [
            self.drawn(prompt.format(name), archive)
            for name, archive in ((TRIGGER, word), (TOKEN, token))
            for prompt in prompts
        ]

    def compared(self, prompts: tuple[str, ...]) -> list[Cell]:
        """Each prompt by the base model, with the LoRA for the trigger word, and with the token's."""
        return [self.drawn(prompt, archive) for prompt in prompts for archive in (None, WORD, ZERO_PRIOR)]

    def sampled(self, archive: str, name: str) -> list[Cell]:
        """What the training itself sampled after a quarter of its steps, from its report."""
        with zipfile.ZipFile(self.archives[archive]) as entries:
            images = [entries.read(f"report/samples/step-{QUARTER:06}-{number}.jpg") for number in range(1, len(BEFORE) + 1)]
        opened = [Image.open(io.BytesIO(content)) for content in images]
        return [Cell(image, SOURCES[archive], prompt.format(name)) for image, prompt in zip(opened, BEFORE, strict=True)]

    def drawn(self, prompt: str, archive: str | None) -> Cell:
        """One image from the server."""
        weights = {"replicate_weights": data_url(self.archives[archive])} if archive else {}
        content = from_data_url(succeeded(self.server.ask({"prompt": prompt, **IMAGE, **weights}))["output"])
        name = re.sub("[^a-zA-Z]+", "-", f"{archive or 'base'} {prompt}").strip("-")
        (OUTPUT / f"{name}.png").write_bytes(content)
        return Cell(Image.open(io.BytesIO(content)), SOURCES[archive], prompt)


def square(image: Image.Image) -> Image.Image:
    """The middle square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def succeeded(answer: dict) -> dict:
    """The answer, unless it is a failure."""
    if answer["status"] != "succeeded":
        raise SystemExit(f"the server answered: {answer.get('error')}")
    return answer


if __name__ == "__main__":
    main()

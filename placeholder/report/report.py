"""The report of a training: curves, pictures, data set, configuration and costs, as files beside the weights."""

import csv
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

from PIL import Image

from placeholder.config import TrainConfig, config_yaml
from placeholder.data.captions import Caption, Source, caption_files
from placeholder.errors import readable_errors
from placeholder.model.base import DEFAULT_MODEL, BaseModel
from placeholder.model.loading import transformer_shell
from placeholder.report.charts import Panel, draw_grid, draw_panels
from placeholder.report.page import Contents, page
from placeholder.report.samples import GUIDANCE, SEED, STEPS, InterruptedDrawing, Sampler, sample_prompts
from placeholder.training.progress import Point
from placeholder.training.setup import Log
from placeholder.training.timing import Timing
from placeholder.training.training import Training
from placeholder.weights.metadata import fixed_time

FOLDER = "report"
QUALITY = 85  # of JPEG; Cog hands archives over as base64
SOURCES: dict[Source, str] = {"file": "caption file", "default": "default_caption", "auto": "autocaption"}
CORRECTING = (
    "The folder captions holds them as files. To correct them, change the text, put the files beside the pictures of their names "
    "in the data set, and train again."
)
SMALL_PARAMETERS = 10**9  # Qwen-Image's transformer has twenty times as many


class Report:
    """Collects what a training shows of itself while it runs; `files` has it all.

    Samples are kept in memory: those of the steps before an interruption are not in the report of the training that goes on.
    Pictures that cannot be drawn, for the want of memory or otherwise, are a warning and a note on the page.
    """

    def __init__(
        self, config: TrainConfig, training: Training, base: BaseModel, log: Log, timing: Timing, stopping: Callable[[], bool]
    ):
        self.config, self.training, self.base, self.log, self.timing = config, training, base, log, timing
        self.sampler = Sampler(
            base,
            training.train_state.transformer,
            training.prompt_embeds,
            training.tokens,
            training.prompts,
            training.empty_ids,
            Sampler.side_of(config),
            stopping,
        )
        self.sample_prompts = sample_prompts(config, [caption.text for caption in training.captions])
        self.samples: dict[int, list[Image.Image]] = {}
        self.grid: dict[str, list[Image.Image]] | None = None
        self.missing: list[str] = []

    def sample(self, step: int) -> float:
        """Draw samples where this step is one of those that have them; returns the seconds that it took."""
        before = self.timing.seconds.get("samples", 0.0)
        if self.config.sample_every and step % self.config.sample_every == 0:
            drawn = self._drawn("samples", f"the samples of step {step}", lambda: self.sampler.draw(self.sample_prompts))
            if drawn is not None:
                self.samples[step] = drawn
                self.log(f"Samples of step {step}: {len(drawn)} drawn")
        return self.timing.seconds.get("samples", 0.0) - before

    def draw_grid(self) -> None:
        """Draw the prompts with and without what was trained."""
        self.grid = self._drawn(
            "pictures", "the pictures before and after", lambda: self.sampler.grid(self.training.initial_rows)
        )

    def _drawn(self, part: str, what: str, draw: Callable[[], Any]) -> Any | None:
        try:
            with self.timing.part(part), readable_errors("draw them with predict, which can stream the models"):
                return draw()
        except InterruptedDrawing:
            return None
        except (RuntimeError, ValueError, OSError) as error:  # the pictures are not worth the training
            self.missing.append(f"Not drawn: {what} ({error})")
            self.log(f"Warning: not drawn for the report: {what} ({error})")
            return None

    def files(self, curve: list[Point], meta: dict[str, Any], diagnostics: list[str]) -> dict[str, bytes]:
        """The files by name; with SOURCE_DATE_EPOCH set they hold nothing that was measured."""
        files = {
            "config.yaml": config_yaml(self.config).encode(),
            "curve.csv": curve_csv(curve).encode(),
            "curve.png": _encoded(draw_panels(panels(curve)), "PNG", optimize=True),
        }
        thumbnails = {f"dataset/{number:03}.jpg": image for number, image in enumerate(self.training.thumbnails, 1)}
        samples = {
            step: {f"samples/step-{step:06}-{number}.jpg": image for number, image in enumerate(images, 1)}
            for step, images in self.samples.items()
        }
        for images in (thumbnails, *samples.values()):
            files |= {name: jpeg(image) for name, image in images.items()}
        if self.grid:
            files["grid.jpg"] = jpeg(draw_grid(self.grid, list(self.training.prompts)))
        if self.config.autocaption:
            files |= {f"captions/{name}": content for name, content in caption_files(self.training.captions).items()}
        contents = self._contents(meta, diagnostics, list(thumbnails), {step: list(names) for step, names in samples.items()})
        files["index.html"] = page(contents).encode()
        return {f"{FOLDER}/{name}": files[name] for name in sorted(files)}

    def _contents(
        self, meta: dict[str, Any], diagnostics: list[str], thumbnails: list[str], samples: dict[int, list[str]]
    ) -> Contents:
        found, fixed = self.training.report, fixed_time() is not None
        tokens = ", ".join(self.config.tokens)
        measured = {"expected at the height": meta.get("expected_peak_gb"), "at the height, on the GPU": meta.get("peak_gb")}
        return Contents(
            title=f"Training of {tokens}" if tokens else "Training of a LoRA without a token",
            notes=base_notes(self.base),
            facts=_facts(meta),
            diagnostics=diagnostics,
            prompts=list(self.training.prompts),
            drawing=f"{STEPS} denoising steps, guidance {GUIDANCE:g}, {self.sampler.side}x{self.sampler.side} pixels, seed {SEED} in every picture.",
            grid="grid.jpg" if self.grid else None,
            columns=list(self.grid or {}),
            samples=samples,
            sample_prompts=self.sample_prompts,
            curve="curve.png",
            data_set={
                "pictures": found.images,
                "captions found": found.captions_found,
                **_filled(self.training.captions),
                "crops by size": ", ".join(f"{bucket}: {count}" for bucket, count in found.buckets.items()),
                "skipped": len(found.skipped),
            },
            captions=[(caption.name, caption.text, SOURCES[caption.source]) for caption in self.training.captions],
            captions_note=CORRECTING if self.config.autocaption else "",
            thumbnails=thumbnails,
            skipped=found.skipped,
            config=config_yaml(self.config),
            seconds={} if fixed else self.timing.seconds,
            memory={} if fixed else {name: f"{value:.1f} GB" for name, value in measured.items() if value is not None},
            missing=self.missing,
        )


def _filled(captions: list[Caption]) -> dict[str, int]:
    """How many captions were not found, by where they come from instead."""
    counts = Counter(caption.source for caption in captions)
    described = {"described by autocaption": counts["auto"]} if counts["auto"] else {}
    return {"filled in with default_caption": counts["default"], **described}


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    ids = ", ".join(f"{token}: {', '.join(map(str, ids))}" for token, ids in meta["placeholder_token_ids"].items())
    facts = {
        "base model": meta["base_model"],
        "revision": meta["base_model_revision"],
        "training": meta["training_mode"],
        "token ids": ids,
        "steps": meta["steps"],
        "rank": meta["rank"],
        "seed": meta["seed"],
        "loss at the end": f"{meta['loss']:.4f}",
        "transformer stored in": meta["transformer_storage"],
        "versions": ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def base_notes(base: BaseModel) -> list[str]:
    """That the base model is a small one, where it is."""
    count = sum(parameter.numel() for parameter in transformer_shell(base).parameters())
    if count >= SMALL_PARAMETERS:
        return []
    return [
        f"The base model is a small one of {count / 1e6:.3g} million parameters, not {DEFAULT_MODEL}: it shows that the training works, not how well {DEFAULT_MODEL} draws."
    ]


def curve_csv(curve: list[Point]) -> str:
    """The curve as a table; a figure that a step does not have is left empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Point._fields)
    table.writerows([point.step, *("" if value is None else f"{value:.6g}" for value in point[1:])] for point in curve)
    return text.getvalue()


def panels(curve: list[Point]) -> list[Panel]:
    """The curve as it is drawn: losses, and below them the norm of the rows where there are any."""

    def values(name: str) -> list[tuple[float, float]]:
        return [(point.step, value) for point in curve if (value := getattr(point, name)) is not None]

    losses = {name: values(name) for name in ("loss", "preservation") if values(name)}
    norms = values("row_norm")
    return [Panel("Loss", losses), *([Panel("Norm of the token's row", {"row norm": norms})] if norms else [])]


def jpeg(image: Image.Image) -> bytes:
    """The picture as a file, as all pictures of a training are shown."""
    return _encoded(image, "JPEG", quality=QUALITY)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()

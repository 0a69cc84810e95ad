"""The report of a training: curves, samples, data set, configuration and costs, as files in the weights archive."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL.Image import Image

from placeholder.config import config_yaml
from placeholder.data.captions import caption_files
from placeholder.errors import out_of_memory, readable_errors
from placeholder.model.base import DEFAULT_MODEL, BaseModel
from placeholder.model.loading import transformer_shell
from placeholder.report.charts import curves, image_grid
from placeholder.report.samples import GUIDANCE, SEED, Sampler, SamplingStopped, sample_prompts, sample_side
from placeholder.training.context import Context, Training
from placeholder.training.loop import Step
from placeholder.training.progress import Point
from placeholder.weights.metadata import fixed_time

FOLDER, PAGE = "report", Path(__file__).with_name("index.html.jinja")
MAX_CAPTION = 500  # characters of a caption on the page
QUALITY = 85  # of JPEG; Cog hands archives over as base64
SMALL_PARAMETERS = 10**9  # Qwen-Image's transformer has twenty times as many


class Report:
    """Samples a training while it runs; `files` has the whole report.

    Samples are kept in memory: those made before an interruption are not in the report of a resumed training. Samples that
    cannot be made, for lack of memory or otherwise, are a warning and a note on the page.
    """

    def __init__(self, training: Training, context: Context, stopping: Callable[[], bool]):
        self.training, self.base, self.config = training, context.base, context.config
        self.log, self.timing = context.log, context.timing
        self.sampler = Sampler(self.base, training, sample_side(self.config), stopping, self.config.token_gate)
        self.sample_prompts = sample_prompts(self.config, [caption.text for caption in training.data.captions])
        self.samples: dict[int, list[tuple[str, Image]]] = {}
        self.columns: list[str] = []
        self.grid: Image | None = None
        self.missing: list[str] = []

    def step(self, step: Step) -> None:
        """Sample the prompts where the step is one of every `sample_every`."""
        number = step.number
        if not self.config.sample_every or number % self.config.sample_every:
            return
        images = self._sampled("samples", f"the samples of step {number}", lambda: self.sampler.sample(self.sample_prompts))
        if images is not None:
            self.samples[number] = list(zip(self.sample_prompts, images, strict=True))
            self.log(f"Samples of step {number}: {len(images)} images")

    def end(self) -> None:
        """Sample the grid: every prompt without and with what was trained."""
        columns = self._sampled("grid", "the grid before and after", self.sampler.grid)
        if columns is not None:
            self.columns, self.grid = list(columns), image_grid(columns, list(self.training.shown_prompts))

    def _sampled(self, part: str, what: str, sample: Callable[[], Any]) -> Any | None:
        try:
            with self.timing.part(part), readable_errors("sample with predict, which can offload the models"):
                return sample()
        except SamplingStopped:
            return None
        except (RuntimeError, ValueError, OSError) as error:  # a sample is not worth the training
            passes = self.training.state.passes
            if passes.holds_memory and out_of_memory(error):
                passes.release()
                return self._sampled(part, what, sample)
            self.missing.append(f"Not sampled: {what} ({error})")
            self.log(f"Warning: not sampled: {what} ({error})")
            return None

    def files(self, curve: list[Point], meta: dict[str, Any], diagnostics: list[str]) -> dict[str, bytes]:
        """The files by name; with SOURCE_DATE_EPOCH set they hold nothing that was measured."""
        thumbnails = {f"dataset/{number:03}.jpg": jpeg(image) for number, image in enumerate(self.training.data.thumbnails, 1)}
        samples = {
            step: {f"samples/step-{step:06}-{number}.jpg": jpeg(image) for number, (_, image) in enumerate(pairs, 1)}
            for step, pairs in self.samples.items()
        }
        files = {"config.yaml": config_yaml(self.config).encode(), "curve.csv": curve_csv(curve).encode()}
        files |= {"curve.png": curves(curve)} | thumbnails
        for images in samples.values():
            files |= images
        if self.grid:
            files["grid.jpg"] = jpeg(self.grid)
        if self.config.autocaption:
            files |= {f"captions/{name}": content for name, content in caption_files(self.training.data.captions).items()}
        files["index.html"] = self._page(meta, diagnostics, list(thumbnails), {step: list(s) for step, s in samples.items()})
        return {f"{FOLDER}/{name}": files[name] for name in sorted(files)}

    def _page(self, meta: dict[str, Any], diagnostics: list[str], thumbnails: list[str], samples: dict) -> bytes:
        tokens, measured, side = ", ".join(self.config.tokens), fixed_time() is None, self.sampler.side
        peaks = {"expected": meta.get("expected_peak_gb"), "on the GPU": meta.get("peak_gb")}
        return render(
            title=f"Training of {tokens}" if tokens else "Training of a LoRA without a token",
            notes=[*base_notes(self.base), *self.missing],
            meta=meta,
            columns=self.columns,
            prompts=list(self.training.shown_prompts),
            samples=samples,
            sample_prompts=self.sample_prompts,
            sampling=f"{self.sampler.steps} steps, guidance {GUIDANCE:g}, {side}x{side} pixels, seed {SEED} in every image.",
            diagnostics=diagnostics,
            found=self.training.data.report,
            captions=self.training.data.captions,
            thumbnails=thumbnails,
            autocaption=self.config.autocaption,
            seconds={name: f"{value:.1f}" for name, value in self.timing.seconds.items() if measured},
            memory={name: f"{value:.1f} GB" for name, value in peaks.items() if measured and value is not None},
            config_yaml=config_yaml(self.config),
        ).encode()


def render(**contents: Any) -> str:
    """The page of index.html.jinja; a name in `contents` that it needs and does not get is an error."""
    environment = Environment(loader=FileSystemLoader(PAGE.parent), autoescape=True, undefined=StrictUndefined)
    environment.filters["cut"] = lambda text: text if len(text) <= MAX_CAPTION else f"{text[:MAX_CAPTION]}..."
    return environment.get_template(PAGE.name).render(contents)


def base_notes(base: BaseModel) -> list[str]:
    """A note for the page where the base model is a small one."""
    count = sum(parameter.numel() for parameter in transformer_shell(base).parameters())
    if count >= SMALL_PARAMETERS:
        return []
    size = f"The base model is a small one of {count / 1e6:.3g} million parameters, not {DEFAULT_MODEL}"
    return [f"{size}: it shows that the training works, not how well {DEFAULT_MODEL} generates."]


def curve_csv(curve: list[Point]) -> str:
    """The progress lines as CSV; a value that a step does not have is left empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Point._fields)
    table.writerows([point.step, *("" if value is None else f"{value:.6g}" for value in point[1:])] for point in curve)
    return text.getvalue()


def jpeg(image: Image) -> bytes:
    """The image as a JPEG file."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()

"""The CUDA path without a GPU: trainings and a prediction at full width with two layers, on a pretended card of 80 GB.

`make check-cuda` fails where tensors of two devices or dtypes meet, a step waits for the GPU, walks over the modules of a model
or copies without non_blocking, a CUDA graph reads a tensor of the host, the blocks' attention is not a fused kernel without a
mask, more bytes are in use than planned, or a step has more kernels than checks/cuda.json has. Then faults are put in, which
have to be found.
"""

from checks.fake_cuda import fake_cuda  # isort: skip - before torch

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import full_size
from checks.cuda_faults import FAULTS, FINDINGS, HEADS, IN_THE_STEP
from checks.fake_cuda.card import VALUE
from placeholder.config import TrainConfig
from placeholder.finetune import finetune
from placeholder.generate import ImageGenerator
from placeholder.job import CheckpointFolder, Job
from placeholder.request import Request
from placeholder.training import diagnostics, loop

COUNTS = Path(__file__).with_name("cuda.json")
SIZES = {
    "text_encoder": {"text_config": full_size.FULL_TEXT_ENCODER | {"num_hidden_layers": 2}},
    "transformer": {"num_layers": 2},
}
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
PRESERVED = TOKEN | {"prior_preservation": 4.0, "prior_preservation_interval": 1}
TRAININGS: dict[str, dict[str, Any]] = {
    "token": TOKEN,
    "baseline": {},
    "token, preservation": PRESERVED,
    "token, int8": TOKEN | {"quantize": True},
    "token, batch 2, blocks checkpointed": PRESERVED | {"batch_size": 2},
    "token, rank 256, blocks checkpointed": TOKEN | {"rank": 256},
    "token, text encoder offloaded": TOKEN | {"quantize": True},
    "token, resumed": TOKEN | {"steps": 4},
}
# Bytes of the card; 80 GB for the others.
SMALL_CARD = {
    "token, batch 2, blocks checkpointed": 5.1e9,
    "token, rank 256, blocks checkpointed": 8.0e9,
    "token, text encoder offloaded": 2.0e9,
}
BLOCKS = {"token, rank 256, blocks checkpointed": 8}  # 2 for the others
PREDICTIONS = {"prediction": 80e9, "prediction, offloaded": 1.5e9}
FAST, FAST_FAULTS = ("token",), ("item",)
LORA_LAYER, WIDTH = "transformer.transformer_blocks.1.attn.to_q", 3072
SMALL_COPY = 2**20  # elements: latents, sigmas and indices, which are copied once an image
MARGIN = 1.03  # of the peak over the plan
PREDICTION_WAITS = 7  # the masks of both prompts, the image, and the token gate, which looks at each prompt twice
full_size.fill = lambda module, name: module  # there are no contents to fill
diagnostics.SAMPLES = 2


class Measured:
    """What the gradients of all steps did on a card."""

    def __init__(self, card: Any):
        self.card, self.peak, self.steps, self.kernels = card, 0, 0, 0
        self.waits, self.blocking, self.walks = Counter(), Counter(), Counter()

    @contextmanager
    def watching(self, fault: str | None) -> Iterator[None]:
        """Measure every step that is made inside, with a fault in it where one is named."""
        original = loop.gradients

        def gradients(*arguments: Any) -> list[Tensor]:
            waits, blocking, kernels = self.card.waits.copy(), self.card.blocking.copy(), self.card.kernels
            self.card.peak = self.card.live
            with FAULTS[fault]() if fault else nullcontext(), counted_walks(self.walks):
                found = original(*arguments)
                if fault in IN_THE_STEP:
                    IN_THE_STEP[fault](found[0])
            self.waits += self.card.waits - waits
            self.blocking += self.card.blocking - blocking
            self.kernels, self.steps = self.kernels + self.card.kernels - kernels, self.steps + 1
            self.peak = max(self.peak, self.card.peak)
            return found

        with patch.object(loop, "gradients", gradients):
            yield


@contextmanager
def counted_walks(walks: Counter) -> Iterator[None]:
    """Count how often a model is asked for its dtype or device, for which diffusers walks over all its modules."""
    with patch.multiple(ModelMixin, **{name: property(_counting(name, walks)) for name in ("dtype", "device")}):
        yield


def _counting(name: str, walks: Counter) -> Callable[[ModelMixin], Any]:
    original = getattr(ModelMixin, name).fget

    def asked(model: ModelMixin) -> Any:
        walks[name] += 1
        return original(model)

    return asked


class Report:
    """What was checked; `failed` holds what was not as it should be."""

    def __init__(self, log: Callable[[str], None] = print):
        self.log, self.failed = log, []

    def check(self, right: bool, what: str) -> None:
        """Log a finding, and keep it where it is wrong."""
        self.log(f"{'ok  ' if right else 'FAIL'} {what}")
        self.failed += [] if right else [what]


def training(name: str, report: Report, counts: dict[str, int], fault: str | None = None, side: int = 512) -> int:
    """One training of two steps, or two steps after a checkpoint, with its checks; returns the kernels of a step."""
    with fake_cuda(SMALL_CARD.get(name, 80e9)) as card, tempfile.TemporaryDirectory() as folder:
        sizes = SIZES | {"transformer": {"num_layers": BLOCKS.get(name, 2)}}
        base = full_size.RandomBase("fake", torch.device("cuda"), torch.bfloat16, sizes=sizes)
        options = {"steps": 2, "caption_dropout": 0.0, "report": False} | TRAININGS[name]  # the second step is captured
        config = TrainConfig(resolution=(side,), seed=0, **options)
        measured, log = Measured(card), []
        job = Job(full_size.write_dataset(Path(folder) / "data.zip", side), config, Path(folder) / "weights.zip")
        if "resumed" in name:
            written = CheckpointFolder(Path(folder) / "checkpoints", 2)
            finetune(replace(job, checkpoints=written), base, log=lambda line: None)
            job = replace(job, resume_from=written.path / "checkpoint-000002.safetensors")
        with measured.watching(fault):
            meta = finetune(job, base, log=log.append)
    kernels = measured.kernels // measured.steps
    report.check(not measured.waits, f"{name}: no step waits for the GPU {dict(measured.waits)}")
    report.check(not measured.walks, f"{name}: no step walks over the modules {dict(measured.walks)}")
    report.check(not measured.blocking, f"{name}: copies to the GPU do not block {dict(measured.blocking)}")
    report.check(not card.captured, f"{name}: no tensor of the host is captured {dict(card.captured)}")
    report.check(not card.mixed, f"{name}: no operation is on tensors of two devices {dict(card.mixed)}")
    planned_offload = any("of the text encoder do not fit" in line for line in log)
    report.check(planned_offload == ("offloaded" in name), f"{name}: the plan offloads the text encoder: {planned_offload}")
    kinds = {kind for kind, heads in card.attention if heads == HEADS}
    report.check(kinds == {"fused"}, f"{name}: the blocks' attention is fused, without a mask {kinds}")
    planned = meta["expected_peak_gb"] * 1e9
    report.check(measured.peak <= MARGIN * planned, f"{name}: {measured.peak / 1e9:.2f} GB of {planned / 1e9:.2f} planned")
    allowed = counts.get(name, kernels)
    report.check(kernels <= allowed, f"{name}: {kernels} kernels a step, {allowed} so far")
    return kernels


def prediction(name: str, report: Report) -> None:
    """An image with its checks."""
    log: list[str] = []
    with fake_cuda(PREDICTIONS[name]) as card, tempfile.TemporaryDirectory() as folder:
        base = full_size.RandomBase("fake", torch.device("cuda"), torch.bfloat16, sizes=SIZES)
        generator = ImageGenerator(base, log.append)
        lora = Path(folder) / "lora.safetensors"
        shapes = {"A": (4, WIDTH), "B": (WIDTH, 4)}
        save_file({f"{LORA_LAYER}.lora_{part}.weight": torch.full(shapes[part], VALUE) for part in shapes}, lora)
        generator.load(lora)
        card.waits.clear()
        card.blocking.clear()
        generator.generate(Request(prompt="a photo", steps=2, width=512, height=512, seed=0), lora)
    waits, offloaded = sum(card.waits.values()), "offloaded" in name
    report.check(log[0].count("offloaded") == 2 * offloaded, f"{name}: {log[0]}")
    report.check(waits <= PREDICTION_WAITS, f"{name}: {waits} waits for the GPU {dict(card.waits)}")
    large = {what: count for what, count in card.blocking.items() if math.prod(what[0]) > SMALL_COPY}
    report.check(not large, f"{name}: large copies to the GPU do not block {large}")
    report.check(not card.mixed, f"{name}: no operation is on tensors of two devices {dict(card.mixed)}")
    kinds = {kind for kind, heads in card.attention if heads == HEADS}
    report.check(kinds == {"fused"}, f"{name}: the blocks' attention is fused, without a mask {kinds}")


def is_found(fault: str) -> bool:
    """Whether a training with a fault in it fails the check that is meant for it."""
    report = Report(log=lambda line: None)
    try:
        training(FAST[0], report, {}, fault)
    except RuntimeError as error:
        report.check(False, str(error))
    return any(FINDINGS[fault] in finding for finding in report.failed)


def main() -> None:
    """Run all, or with `--fast` one training and one fault; the kernels of a step that passes are written down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    fast = parser.parse_args().fast
    counts: dict[str, int] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    report = Report()
    found = {name: training(name, report, counts) for name in (FAST if fast else TRAININGS)}
    if not fast:
        for name in PREDICTIONS:
            prediction(name, report)
    for fault in FAST_FAULTS if fast else FAULTS:
        report.check(is_found(fault), f"the fault {fault!r} is found")
    if report.failed:
        raise SystemExit(f"{len(report.failed)} failed")
    if not fast:
        COUNTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

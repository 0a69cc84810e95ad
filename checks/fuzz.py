"""Reads mutated weights archives, data sets and configuration files end to end: each is accepted, or refused by a sentence."""

import argparse
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from checks.mutations import Entries, mutated_yaml
from checks.mutations_dataset import mutated_dataset
from checks.mutations_weights import mutated_weights
from demo.server import ROOT
from placeholder.config import TrainConfig, config_yaml, train_config
from placeholder.data.captions import place_token
from placeholder.data.dataset import read_dataset
from placeholder.generate import ImageGenerator
from placeholder.lora.adapter import A, B
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.weights.archive import Weights, write_weights
from standin.small_base import build_tiny_base
from tests.support.samples import read_zip

MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 10, 2 * 1024**3, 2000
PROCESS = Path("/proc/self")
PACKAGE = str(ROOT / "placeholder")


class TooLongError(BaseException):
    """A case took more than MAX_SECONDS; not an Exception, so that nothing on the way takes it for its own."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case: the sentence it was refused by, or what was wrong about that; both empty: it was accepted."""

    seconds: float
    grown: int
    sentence: str
    failure: str


class Target:
    """The reading side of the package on the tiny base model, and one valid archive for it."""

    def __init__(self, base: BaseModel, folder: Path):
        self.lines: list[str] = []
        self.generator = ImageGenerator(base, self.lines.append)
        self.transformer = self.generator.pipeline.transformer
        self.before = {name: value.clone() for name, value in self.transformer.state_dict().items()}
        self.valid = self._valid(base, folder / "valid.zip")
        self.case, self.watched = folder / "case", folder / "watched"
        self.watched.mkdir()

    def _valid(self, base: BaseModel, path: Path) -> Entries:
        lora: dict[str, torch.Tensor] = {}
        for name, layer in self.transformer.named_modules():
            if name.endswith(tuple("." + target for target in QWEN_IMAGE.lora_target_modules)):
                lora |= {name + A: torch.full((2, layer.in_features), 0.1), name + B: torch.full((layer.out_features, 2), 0.1)}
        ids = {"<zwx>": [151665], "<qrs>": [151666, 151667]}
        meta = {"base_model": base.source, "placeholder_token_ids": ids, "training_mode": "zero_prior", "loss": 0.5}
        embeddings = {token: torch.full((len(rows), 32), 0.1) for token, rows in ids.items()}
        write_weights(path, Weights(lora, embeddings, meta), {"r": 2, "lora_alpha": 2})
        return list(read_zip(path).items())

    def mutated(self, kind: str, seed: int) -> bytes:
        """The bytes of the case."""
        if kind == "weights":
            return mutated_weights(self.valid, seed)
        return mutated_dataset(seed) if kind == "dataset" else mutated_yaml(config_yaml(TrainConfig(seed=0)), seed)

    def weights(self) -> None:
        """Apply the case's archive and take it off again."""
        try:
            self.generator.load(self.case)
        finally:
            self.generator.weights.remove()
            self.generator.weights.archives.clear()

    def dataset(self) -> None:
        """Read the case's data set and place a token in its captions."""
        photos, report = read_dataset(self.case, (64,))
        self.lines += report.lines()
        for photo in photos:
            place_token(photo.caption or "A photo of <>", ("<zwx>",), photo.name)

    def yaml(self) -> None:
        """Read the case's configuration."""
        train_config({}, self.case)

    def try_case(self, kind: str, seed: int) -> Outcome:
        """Write the case, read it, and judge what happened."""
        self.case.write_bytes(self.mutated(kind, seed))
        self.lines.clear()
        if PROCESS.exists():
            (PROCESS / "clear_refs").write_text("5")  # reset the peak memory (proc(5))
        held, start, sentence, wrong = used_bytes("VmRSS"), time.monotonic(), "", []
        try:
            with _guarded(self.watched):
                getattr(self, kind)()
        except (Exception, TooLongError) as error:  # noqa: BLE001 - to judge every one is what this is for
            sentence = str(error)
            wrong += _not_ours(error)
        seconds, grown = time.monotonic() - start, used_bytes("VmHWM") - held
        if grown > MAX_BYTES:
            wrong.append(f"it took {grown} bytes")
        if seconds > MAX_SECONDS:
            wrong.append(f"it took {seconds:.0f} seconds")
        wrong += [f"unfit for a log: {ascii(line)[:300]}" for line in [*self.lines, sentence] if not fit_for_a_log(line)]
        wrong += [f"it left {path.name} behind" for path in self.watched.iterdir()]
        if kind == "weights" and not self._untouched():
            wrong.append("the transformer is not what it was")
        return Outcome(seconds, grown, sentence, "; ".join(wrong))

    def _untouched(self) -> bool:
        after = self.transformer.state_dict()
        return after.keys() == self.before.keys() and all(
            torch.equal(value, self.before[name]) for name, value in after.items()
        )


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """An alarm after MAX_SECONDS, and `folder` as the place for temporary and for carelessly written files."""

    def stop(*_):
        raise TooLongError

    came_from, temporary, handler = Path.cwd(), tempfile.tempdir, signal.signal(signal.SIGALRM, stop)
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        tempfile.tempdir = temporary
        os.chdir(came_from)


def _not_ours(error: BaseException) -> list[str]:
    """Why the error is not a sentence of this package; empty where it is one."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error) is ValueError and raised_in.startswith(PACKAGE) and str(error):
        return []
    return ["".join(traceback.format_exception(error)[-12:])]


def fit_for_a_log(line: str) -> bool:
    """Whether the line is one line, short enough, and free of control characters."""
    return len(line) <= MAX_CHARACTERS and not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in line)


def _kind_of(sentence: str) -> str:
    """The beginning of a sentence, without the names and numbers in it."""
    return " ".join(re.sub(r"'[^']*'|[0-9]+", "*", sentence).split()[:8])


def used_bytes(key: str) -> int:
    """This process's memory now (VmRSS), its address space (VmSize), or its peak memory since the last reset (VmHWM).

    0 without /proc.
    """
    if not PROCESS.exists():
        return 0
    (line,) = (line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run(target: Target, kind: str, seeds: range, log: Callable[[str], None] = print) -> list[int]:
    """Try all cases of one kind, log a table of what became of them, and return the seeds that failed."""
    outcomes = {seed: target.try_case(kind, seed) for seed in seeds}
    failed = [seed for seed, outcome in outcomes.items() if outcome.failure]
    for seed in failed:
        log(
            f"{kind} {seed} failed: {outcomes[seed].failure}\n"
            f"  repeat it with: python -m checks.fuzz --kind {kind} --first {seed} --count 1"
        )
    sentences = Counter(_kind_of(outcome.sentence) for outcome in outcomes.values())
    slowest = max(seeds, key=lambda seed: outcomes[seed].seconds)
    largest = max(seeds, key=lambda seed: outcomes[seed].grown)
    log(
        f"{kind}: {len(seeds)} cases, {sentences.pop('', 0)} accepted, {len(failed)} failed, "
        f"slowest {outcomes[slowest].seconds:.2f} s (seed {slowest}), "
        f"peak memory {outcomes[largest].grown / 1e6:.0f} MB above what was held (seed {largest})"
    )
    for sentence, count in sentences.most_common():
        log(f"{count:6} {sentence}")
    return failed


def main() -> int:
    """Run the cases that the command line asks for; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=["weights", "dataset", "yaml"], help="all three where left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = BaseModel(str(build_tiny_base(ROOT / ".cache" / "tiny-base")), torch.device("cpu"), torch.float32)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        target = Target(base, Path(folder))
        if PROCESS.exists():
            resource.setrlimit(resource.RLIMIT_AS, (used_bytes("VmSize") + MAX_BYTES, resource.RLIM_INFINITY))
        for kind in [arguments.kind] if arguments.kind else ["weights", "dataset", "yaml"]:
            failed += run(target, kind, range(arguments.first, arguments.first + arguments.count))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

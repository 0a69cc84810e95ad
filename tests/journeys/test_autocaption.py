"""Autocaption from end to end: in the training, in the archive, corrected, resumed, and on a base model that cannot see."""

import re
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from placeholder.config import TrainConfig
from placeholder.data.autocaption import draft
from placeholder.data.captions import trained_captions
from placeholder.data.dataset import Photo
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job
from placeholder.model import captioner
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training.checkpoint import Checkpoint
from placeholder.training.context import Context
from placeholder.training.setup import prepare
from placeholder.weights.archive import LORA_NAME
from tests.conftest import SHORT
from tests.report.test_report import page_of
from tests.support.samples import Run, WithoutWeights, encoded, picture, read_zip, train, write_dataset, write_zip

CONFIG = TrainConfig(
    **SHORT | {"steps": 4},
    train_placeholder_token=True,
    placeholder_token=("<zwx>",),
    autocaption=True,
    autocaption_prefix="a photo of [trigger], ",
    autocaption_suffix=" 35mm",
)
ROWS = "embeddings/zwx.safetensors"
DESCRIBED = r"a photo of <zwx>, \S.* 35mm"
FOLDER = "report/captions/"


@pytest.fixture(autouse=True, scope="module")
def short():
    """Descriptions of a few words: the tiny model does not end them by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioner, "MAX_NEW_TOKENS", 5)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four images: one has a caption, one an empty one, two none."""
    names = {"a.png": 0, "x/b.png": 1, "c.png": 2, "d.png": 3}
    entries = {name: encoded(picture(64, 64, seed=seed)) for name, seed in names.items()}
    entries |= {"a.txt": b"<zwx> in a garden", "d.txt": b" \n"}
    return write_zip(tmp_path_factory.mktemp("data") / "data.zip", entries)


@pytest.fixture(scope="module")
def described(short, images, vision_base, tmp_path_factory) -> tuple[Run, Path]:
    """A training with the token and a report, and its checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("described")
    config, log = replace(CONFIG, report=True), []
    checkpoints = CheckpointFolder(folder / "checkpoints", 2)
    meta = finetune(Job(images, config, folder / "w.zip", checkpoints=checkpoints), vision_base, log.append)
    return Run(config, folder / "w.zip", meta, log), checkpoints.path / "checkpoint-000002.safetensors"


def captions_of(run: Run) -> list[str]:
    return [line for line in run.log if line.startswith("Caption of ")]


def test_images_without_a_caption_get_prefix_description_and_suffix(described):
    run, _ = described
    given, *made = captions_of(run)
    assert given == "Caption of a.png (file): <zwx> in a garden"
    found = [re.fullmatch(rf"Caption of (\S+) \(auto\): ({DESCRIBED})", line) for line in made]
    assert [match[1] for match in found] == ["c.png", "d.png", "x/b.png"]
    assert len({match[2] for match in found}) == 3
    assert run.log.count("Captions: 0 of 4 lacked the token and got it in front") == 1
    assert "Data set: 4 images, 1 captions found, 3 to be captioned by autocaption" in run.log
    assert (run.meta["captions_found"], run.meta["captions_described"]) == (1, 3)
    assert (run.meta["autocaption"], run.meta["autocaption_prefix"]) == (True, "a photo of [trigger], ")


def test_the_report_shows_where_each_caption_comes_from_and_holds_them_as_files(described):
    run, _ = described
    files = {name: content for name, content in read_zip(run.archive).items() if name.startswith(FOLDER)}
    assert list(files) == [f"{FOLDER}{name}.txt" for name in ("a", "c", "d", "x/b")]
    text = page_of(run).text
    for name, content in files.items():
        caption = content.decode().removesuffix("\n")
        assert any(line.startswith(f"Caption of {name[len(FOLDER) : -4]}.png") and line.endswith(caption) for line in run.log)
        assert caption in text
    assert text.count("caption file") == 1
    assert text.count("autocaption", text.index("Captions as trained"), text.index("The folder captions")) == 3
    assert "described by autocaption3" in text
    assert "filled in with default_caption0" in text


def test_the_caption_files_next_to_the_images_give_the_same_training(described, images, vision_base, tmp_path):
    run, _ = described
    captions = {name[len(FOLDER) :]: text for name, text in read_zip(run.archive).items() if name.startswith(FOLDER)}
    given = write_zip(tmp_path / "data.zip", read_zip(images) | captions)
    again = train(given, CONFIG, tmp_path / "again.zip", vision_base)
    assert not [line for line in again.log if line.startswith("Autocaption")]
    assert (again.entry(LORA_NAME), again.entry(ROWS)) == (run.entry(LORA_NAME), run.entry(ROWS))
    assert (again.meta["dataset_digest"], again.meta["captions_described"]) == (run.meta["dataset_digest"], 0)


def resumed(start: Path, dataset: Path, base: BaseModel, output: Path, **changes) -> Run:
    config, log = replace(CONFIG, **changes), []
    meta = finetune(Job(dataset, config, output, resume_from=start), base, log.append)
    return Run(config, output, meta, log)


def test_a_resumed_training_has_the_captions_of_its_checkpoint(described, images, vision_base, tmp_path):
    run, start = described
    again = resumed(start, images, vision_base, tmp_path / "w.zip")
    assert not [line for line in again.log if line.startswith("Autocaption")]
    assert captions_of(again) == captions_of(run)
    assert (again.entry(LORA_NAME), again.entry(ROWS)) == (run.entry(LORA_NAME), run.entry(ROWS))


def test_a_training_does_not_resume_on_other_images_captions_or_affixes(described, images, vision_base, tmp_path):
    _, start = described
    for number, changed in enumerate(({"c.txt": b"<zwx> on a beach"}, {"a.txt": b"<zwx> on a beach"})):
        other = write_zip(tmp_path / f"{number}.zip", read_zip(images) | changed)
        with pytest.raises(ValueError, match="checkpoint-000002.* was made on another data set: give the one it was made on"):
            resumed(start, other, vision_base, tmp_path / "never.zip")
    with pytest.raises(ValueError, match="was made with autocaption_suffix ' 35mm', this training has None"):
        resumed(start, images, vision_base, tmp_path / "never.zip", autocaption_suffix=None)
    for descriptions in (None, "text", [1, 2, 3]):
        damaged = Checkpoint("c.safetensors", {}, {"descriptions": descriptions})
        with pytest.raises(ValueError, match=r"c\.safetensors does not hold the captions it was trained with"):
            prepare(images, Context(CONFIG, vision_base, lambda line: None, start=damaged))


@dataclass(frozen=True)
class Watched(BaseModel):
    """A base model that keeps weak references to what is loaded as the text encoder."""

    loaded: list[weakref.ref] = field(default_factory=list, hash=False)

    def component(self, kind, name, **options):
        """The component."""
        found = super().component(kind, name, **options)
        if kind is Qwen2_5_VLForConditionalGeneration:
            self.loaded.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
        return found


def test_the_model_that_captions_is_gone_before_the_training_and_the_text_encoder_is_the_usual_one(images, vision_base):
    base = Watched(vision_base.source, vision_base.device, vision_base.dtype)
    training = prepare(images, Context(CONFIG, base, lambda line: None))
    assert [whole() for whole in base.loaded] == [None, None]
    expected = load_text_encoder(vision_base).state_dict()
    found = training.prompt_embeds.text_encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def without_weights(base: BaseModel) -> BaseModel:
    return WithoutWeights(base.source, base.device, base.dtype)


def test_bad_captions_are_refused_before_any_weight_is_loaded(base, vision_base, images, tmp_path):
    two = replace(CONFIG, placeholder_token=("<a>", "<b>"))
    some = write_dataset(tmp_path / "data.zip", ["<a> in a garden", None])
    unnamed = write_dataset(tmp_path / "unnamed.zip", ["in a garden", None])
    cases = [
        (some, two, vision_base, "autocaption cannot tell which of <a>, <b> an image shows"),
        (unnamed, replace(two, autocaption_suffix="<b>"), vision_base, "the caption of 0.png names none of <a>, <b>"),
        (images, CONFIG, base, "autocaption needs a base model whose text encoder can see"),
    ]
    for dataset, config, model, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            prepare(dataset, Context(config, without_weights(model), lambda line: None))
    captioned = write_dataset(tmp_path / "captioned.zip", ["<zwx> in a garden"])
    with pytest.raises(AssertionError, match="were loaded"):  # where there is nothing to describe the training goes on
        prepare(captioned, Context(CONFIG, without_weights(base), lambda line: None))


def test_the_draft_is_longer_than_any_caption_that_was_made(described, tokenizer):
    run, _ = described
    tokens = PlaceholderTokens(len(tokenizer), {"<zwx>": torch.zeros(1, 32)}, 32)
    texts = [line.partition("): ")[2] for line in captions_of(run)]
    (longest,) = trained_captions([Photo("", None, ())], run.config, lambda line: None, [draft(run.config)])
    lengths = [len(prompt_ids(tokenizer, tokens, text)) for text in (*texts, longest.text)]
    assert max(lengths[:-1]) < lengths[-1]

"""Captions that the text encoder makes itself: in the training, in the archive, corrected, resumed."""

import re
import weakref
from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.data.captions import Caption, caption_files, draft_length, trained_captions
from placeholder.data.dataset import Photo
from placeholder.finetune import finetune
from placeholder.job import CheckpointFolder, Job
from placeholder.model import captioner
from placeholder.model.loading import load_text_encoder
from placeholder.report import samples as samples_module
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training import setup as prepare_module
from placeholder.training.setup import prepare
from placeholder.weights.archive import LORA_NAME, read_weights
from tests.conftest import SHORT
from tests.report.test_report import page_of
from tests.support.samples import Run, encoded, picture, read_zip, train, write_dataset, write_zip

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


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Descriptions of a few words, pictures of two denoising steps, and a plan that is made once for each kind of training."""
    plan, planned = prepare_module.plan_training, {}

    def plan_once(base, config, *others):
        kind = (base, config.tokens, config.autocaption, config.quantize_te)
        return planned[kind] if kind in planned else planned.setdefault(kind, plan(base, config, *others))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "plan_training", plan_once)
        patch.setattr(captioner, "MAX_NEW_TOKENS", 5)
        patch.setattr(samples_module, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures: one has a caption, one an empty one, two none."""
    names = {"a.png": 0, "x/b.png": 1, "c.png": 2, "d.png": 3}
    entries = {name: encoded(picture(64, 64, seed=seed)) for name, seed in names.items()}
    entries |= {"a.txt": b"<zwx> in a garden", "d.txt": b" \n"}
    return write_zip(tmp_path_factory.mktemp("data") / "data.zip", entries)


@pytest.fixture(scope="module")
def described(quick, pictures, vision_base, tmp_path_factory) -> tuple[Run, CheckpointFolder]:
    """A training with the token, a report and a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("described")
    config, log = replace(CONFIG, report=True), []
    checkpoints = CheckpointFolder(folder / "checkpoints", 2)
    meta = finetune(Job(pictures, config, folder / "w.zip", checkpoints=checkpoints), vision_base, log.append)
    return Run(config, folder / "w.zip", meta, log), checkpoints


def never(*_):
    raise AssertionError("weights were loaded")


def test_pictures_without_a_caption_get_prefix_description_and_suffix_and_the_others_keep_theirs(described):
    run, _ = described
    lines = [line for line in run.log if line.startswith("Caption of ")]
    assert lines[0] == "Caption of a.png (file): <zwx> in a garden"
    found = [re.fullmatch(rf"Caption of (\S+) \(auto\): ({DESCRIBED})", line) for line in lines[1:]]
    assert [match[1] for match in found] == ["c.png", "d.png", "x/b.png"]
    assert len({match[2] for match in found}) == 3
    assert run.log.count("Captions: 0 of 4 lacked the token and got it in front") == 1
    assert "Data set: 4 images, 1 captions found, 3 to be described by autocaption" in run.log
    assert any(line.startswith("Autocaption: 3 images are described; the instruction: Write a caption") for line in run.log)
    assert (run.meta["captions_found"], run.meta["captions_described"]) == (1, 3)
    assert (run.meta["autocaption"], run.meta["autocaption_prefix"]) == (True, "a photo of [trigger], ")


def test_the_report_shows_where_each_caption_comes_from_and_holds_them_as_files(described):
    run, _ = described
    files = {name: content for name, content in read_zip(run.archive).items() if name.startswith("report/captions/")}
    assert list(files) == [f"report/captions/{name}.txt" for name in ("a", "c", "d", "x/b")]
    text = page_of(run).text
    for name, content in files.items():
        caption = content.decode().removesuffix("\n")
        assert f"Caption of {name[16:-4]}.png" in "\n".join(line for line in run.log if line.endswith(caption))
        assert caption in text
    assert text.count("caption file") == 1
    assert text.count("autocaption", text.index("Captions as trained"), text.index("The folder captions")) == 3
    assert "described by autocaption3" in text
    assert "filled in with default_caption0" in text
    assert read_weights(run.archive).meta["captions_described"] == 3


def test_the_caption_files_put_beside_the_pictures_give_the_same_training(
    described, pictures, vision_base, tmp_path, monkeypatch
):
    run, _ = described
    captions = {name[16:]: text for name, text in read_zip(run.archive).items() if name.startswith("report/captions/")}
    monkeypatch.setattr(prepare_module, "load_vlm", never)  # there is nothing to describe
    given = write_zip(tmp_path / "data.zip", read_zip(pictures) | captions)
    again = train(given, CONFIG, tmp_path / "again.zip", vision_base)
    assert (again.entry(LORA_NAME), again.entry(ROWS)) == (run.entry(LORA_NAME), run.entry(ROWS))
    assert (again.meta["dataset_digest"], again.meta["captions_described"]) == (run.meta["dataset_digest"], 0)


def test_a_resumed_training_has_the_captions_of_its_checkpoint_and_asks_nobody(
    described, pictures, vision_base, tmp_path, monkeypatch
):
    run, checkpoints = described
    monkeypatch.setattr(prepare_module, "load_vlm", never)
    start, log = checkpoints.path / "checkpoint-000002.safetensors", []
    meta = finetune(Job(pictures, CONFIG, tmp_path / "w.zip", resume_from=start), vision_base, log.append)
    resumed = Run(CONFIG, tmp_path / "w.zip", meta, log)
    assert (resumed.entry(LORA_NAME), resumed.entry(ROWS)) == (run.entry(LORA_NAME), run.entry(ROWS))
    assert [line for line in log if "Caption of" in line] == [line for line in run.log if "Caption of" in line]
    fewer = write_zip(tmp_path / "fewer.zip", read_zip(pictures) | {"c.txt": b"<zwx> on a beach"})
    with pytest.raises(ValueError, match=r"checkpoint-000002.* was made on another data set: give the one it was made on"):
        train_from(start, fewer, vision_base, tmp_path)
    changed = write_zip(tmp_path / "changed.zip", read_zip(pictures) | {"a.txt": b"<zwx> on a beach"})
    with pytest.raises(ValueError, match="was made on another data set"):
        train_from(start, changed, vision_base, tmp_path)
    with pytest.raises(ValueError, match="was made with autocaption_suffix ' 35mm', this training has None"):
        train_from(start, pictures, vision_base, tmp_path, autocaption_suffix=None)


def train_from(start, dataset, base, folder, **changes):
    return finetune(Job(dataset, replace(CONFIG, **changes), folder / "never.zip", resume_from=start), base, lambda line: None)


@pytest.mark.parametrize("descriptions", [None, "text", [1, 2, 3]])
def test_a_checkpoint_with_damaged_descriptions_gets_its_sentence(descriptions, described, pictures, vision_base, monkeypatch):
    _, checkpoints = described
    start = prepare_module.Checkpoint("c.safetensors", {}, {"descriptions": descriptions})
    with pytest.raises(ValueError, match=r"c\.safetensors does not hold the captions it was trained with"):
        prepare(pictures, CONFIG, vision_base, lambda line: None, start=start)


@pytest.mark.parametrize("quantize_te", [False, True])
def test_the_vision_tower_goes_and_the_language_model_stays_as_it_is_loaded_without(
    quantize_te, pictures, vision_base, monkeypatch
):
    load_vlm, language_model = prepare_module.load_vlm, prepare_module.language_model
    wholes, kept = [], []

    def load(base):
        whole = load_vlm(base)
        assert sum(1 for _ in whole.model.visual.parameters()) > 0
        wholes.append(weakref.ref(whole))
        return whole

    def keep(*given):
        kept.append(language_model(*given))
        return kept[0]

    monkeypatch.setattr(prepare_module, "load_vlm", load)
    monkeypatch.setattr(prepare_module, "language_model", keep)
    monkeypatch.setattr(prepare_module, "load_text_encoder", never)  # nothing is read twice
    config = replace(CONFIG, quantize_te=True, train_placeholder_token=False) if quantize_te else CONFIG
    prepare(pictures, config, vision_base, lambda line: None)
    assert [whole() for whole in wholes] == [None]
    expected, found = load_text_encoder(vision_base, "int8" if quantize_te else "none").state_dict(), kept[0].state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and torch.equal(value, found[name]), name


def worded(config: TrainConfig, *descriptions: str) -> tuple[list[Caption], list[str]]:
    """The captions of pictures without any, and the log."""
    log: list[str] = []
    photos = [Photo(f"{number}.png", None, (), file=f"{number}.png") for number in range(len(descriptions))]
    return trained_captions(photos, config, log.append, descriptions), log


def test_a_token_that_is_named_nowhere_is_put_in_front():
    captions, log = worded(replace(CONFIG, autocaption_prefix=None), "It sits.", "A <zwx> sits.", "Here [trigger] sits.")
    assert [caption.text for caption in captions] == ["<zwx> It sits. 35mm", "A <zwx> sits. 35mm", "Here <zwx> sits. 35mm"]
    assert log[0] == "Captions: 1 of 3 lacked the token and got it in front"
    assert log[2] == "Caption of 1.png (auto): A <zwx> sits. 35mm"


def test_in_the_baseline_captions_are_taken_literally():
    (caption,), log = worded(replace(CONFIG, train_placeholder_token=False), "It sits.")
    assert caption.text == "a photo of [trigger], It sits. 35mm"
    assert log == [f"Caption of 0.png (auto): {caption.text}"]


def test_a_model_without_a_word_leaves_prefix_and_suffix_or_else_the_default():
    captions, _ = worded(CONFIG, "")
    assert captions[0][1:3] == ("a photo of <zwx>, 35mm", "auto")
    captions, log = worded(replace(CONFIG, autocaption_prefix=None, autocaption_suffix=None), "", "It sits.")
    assert captions[0][1:3] == ("A photo of a person named <zwx>", "default")
    assert captions[1][1:3] == ("<zwx> It sits.", "auto")
    assert "Caption of 0.png (default): A photo of a person named <zwx>" in log


def test_of_several_tokens_prefix_or_suffix_has_to_name_one_before_any_weight_is_loaded(vision_base, tmp_path, monkeypatch):
    two = replace(CONFIG, placeholder_token=("<a>", "<b>"))
    for name in ("load_vae", "load_vlm", "load_text_encoder", "load_transformer"):
        monkeypatch.setattr(prepare_module, name, never)
    dataset = write_dataset(tmp_path / "data.zip", ["<a> in a garden", None])
    sentence = "autocaption cannot tell which of <a>, <b> a picture shows: name one in autocaption_prefix or autocaption_suffix"
    with pytest.raises(ValueError, match=sentence):
        train(dataset, two, tmp_path / "never.zip", vision_base)
    named = replace(two, autocaption_suffix="<b>")
    (caption,), _ = worded(named, "It sits.")
    assert caption.text == "a photo of [trigger], It sits. <b>"
    without = write_dataset(tmp_path / "without.zip", ["in a garden", None])
    with pytest.raises(ValueError, match="the caption of 0.png names none of <a>, <b>"):
        train(without, named, tmp_path / "never.zip", vision_base)


def test_the_small_base_says_that_it_cannot_before_any_weight_is_loaded(base, pictures, dataset, tmp_path, monkeypatch):
    for name in ("load_vae", "load_vlm", "load_text_encoder", "load_transformer"):
        monkeypatch.setattr(prepare_module, name, never)
    with pytest.raises(ValueError, match="autocaption needs a base model whose text encoder can see"):
        train(pictures, CONFIG, tmp_path / "never.zip", base)
    captioned = write_dataset(tmp_path / "data.zip", ["<zwx> in a garden"])
    with pytest.raises(AssertionError, match="weights were loaded"):  # where there is nothing to describe it goes on
        train(captioned, CONFIG, tmp_path / "never.zip", base)


def test_the_plan_counts_the_eyes_and_the_longest_description_only_where_they_are_used(
    pictures, vision_base, tmp_path, monkeypatch
):
    planned, plan = [], prepare_module.plan_training
    monkeypatch.setattr(prepare_module, "plan_training", lambda *given: planned.append(given) or plan(*given))
    for name in ("load_vae", "load_vlm", "load_text_encoder", "load_transformer"):
        monkeypatch.setattr(prepare_module, name, never)
    captioned = write_dataset(tmp_path / "captioned.zip", ["<zwx> in a garden"])
    for dataset in (pictures, captioned):
        with pytest.raises(AssertionError, match="weights were loaded"):
            prepare(dataset, CONFIG, vision_base, lambda line: None)
    assert [given[1].autocaption for given in planned] == [True, False]
    assert planned[0][3] > planned[1][3] + 90


def test_the_draft_is_longer_than_what_comes(described, tokenizer):
    run, _ = described
    tokens = PlaceholderTokens(len(tokenizer), {"<zwx>": torch.zeros(1, 32)}, 32)
    texts = [line.partition("): ")[2] for line in run.log if line.startswith("Caption of ")]
    assert max(len(prompt_ids(tokenizer, tokens, text)) for text in texts) < draft_length(run.config, tokenizer, tokens)


def test_caption_files_have_the_pictures_names_where_these_will_do():
    files = ("a.png", "A.jpg", "x/é.webp", "bad\x07.png", "n" * 200 + ".png", "b.c.png")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert list(found) == ["a.txt", "picture-00002.txt", "x/é.txt", "picture-00004.txt", "picture-00005.txt", "b.c.txt"]
    assert found["x/é.txt"] == b"caption 2\n"


def test_a_caption_file_by_number_takes_no_other_pictures_place():
    files = ("a.jpg", "a.png", "picture-00002.jpg")
    found = caption_files([Caption("shown", f"caption {number}", "auto", file) for number, file in enumerate(files)])
    assert found == {"a.txt": b"caption 0\n", "picture-00002-.txt": b"caption 1\n", "picture-00002.txt": b"caption 2\n"}

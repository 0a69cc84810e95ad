"""A whole training: what it logs, what its archive holds, what it leaves untouched, and what stops it."""

import json
import re
import types
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load, save

from placeholder import finetune as finetune_module
from placeholder.config import YAML_SECTIONS, TrainConfig, train_config
from placeholder.finetune import verify_archive
from placeholder.job import Job
from placeholder.lora.adapter import B, add_lora
from placeholder.model.loading import load_text_encoder, load_transformer
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, initial_embeddings
from placeholder.tokens.prompt_encoder import PromptEncoder, prompt_ids
from placeholder.training.context import COMPILED_FROM, compiles, with_seed
from placeholder.training.examples import BatchSampler, Example
from placeholder.training.loop import Step, TrainState
from placeholder.training.losses import Denoiser
from placeholder.training.optimizers import token_rms_limit
from placeholder.training.progress import Progress
from placeholder.transformer.layers import Int8Linear
from placeholder.weights.archive import LORA_NAME, Weights, read_weights
from placeholder.weights.metadata import MEASURED
from tests.conftest import SHORT
from tests.support.bases import WatchedBase
from tests.support.samples import Run, WithoutWeights, read_zip, train, write_dataset, write_zip

ROW_NAME = "embeddings/zwx.safetensors"
ZERO_PRIOR = TrainConfig(**SHORT, train_placeholder_token=True, placeholder_token=("<zwx>",))


def test_the_zero_prior_archive_holds_the_lora_the_row_and_meta_json(zero_prior):
    assert list(read_zip(zero_prior.archive)) == [ROW_NAME, LORA_NAME, "meta.json"]
    row = zero_prior.tensors(ROW_NAME)
    assert list(row) == ["qwen25_7b"]
    assert row["qwen25_7b"].shape == (1, 32)
    assert row["qwen25_7b"].dtype == torch.float32
    lora = zero_prior.tensors(LORA_NAME)
    assert len(lora) == 32
    assert all(re.fullmatch(r"transformer\.transformer_blocks\.\d\.attn\..*\.lora_[AB]\.weight", key) for key in lora)
    assert {value.dtype for value in lora.values()} == {torch.bfloat16}


def test_meta_json_says_what_a_reader_needs(zero_prior, base):
    meta = json.loads(zero_prior.entry("meta.json"))
    assert meta == zero_prior.meta
    expected = {
        "base_model": base.source,
        "train_placeholder_token": True,
        "placeholder_token": "<zwx>",
        "placeholder_token_id": 151665,
        "placeholder_token_ids": {"<zwx>": [151665]},
        "placeholder_init_std": 1e-5,
        "rank": 4,
        "lora_alpha": 4,
        "steps": 15,
        "training_mode": "zero_prior",
        "resolution": "64",
        "seed": 1,
        "images": 3,
        "captions_found": 2,
        "buckets": {"64x64": 2, "80x48": 1},
    }
    assert {name: meta[name] for name in expected} == expected
    assert {field.name for field in fields(TrainConfig)} <= set(meta)
    norm = zero_prior.tensors(ROW_NAME)["qwen25_7b"].norm().item()
    assert meta["placeholder_row_norms"]["<zwx>"] == [pytest.approx(norm)]
    assert set(meta["versions"]) == {"torch", "diffusers", "transformers", "peft"}


def test_the_header_of_the_lora_tells_other_tools_what_it_is_and_diffusers_loads_it(zero_prior, baseline, base, tmp_path):
    for run, tokens in ((zero_prior, "<zwx>"), (baseline, None)):
        file = tmp_path / "lora.safetensors"
        file.write_bytes(run.entry(LORA_NAME))
        with safe_open(file, framework="pt") as opened:
            found = {name: value for name, value in opened.metadata().items() if name.startswith("modelspec.")}
        name = Path(base.source).name
        expected = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "Qwen-Image/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": f"LoRA of {name} for {tokens}" if tokens else f"LoRA of {name}",
            "modelspec.resolution": "64x64",
        }
        assert found == (expected | {"modelspec.trigger_phrase": tokens} if tokens else expected)
        stock = QwenImagePipeline(None, None, None, None, load_transformer(base))
        stock.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="subject")
        applied = get_peft_model_state_dict(stock.transformer, adapter_name="subject")
        stored = run.tensors(LORA_NAME)
        assert len(applied) == len(stored)
        assert all(torch.equal(value, stored[f"transformer.{key}"]) for key, value in applied.items())


def test_created_is_the_time_in_utc_with_a_z(zero_prior):
    created = zero_prior.meta["created"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created)
    age = datetime.now(UTC) - datetime.fromisoformat(created)
    assert timedelta(0) <= age < timedelta(hours=1)


def test_meta_json_of_a_baseline_names_no_token(baseline):
    expected = {
        "training_mode": "baseline",
        "train_placeholder_token": False,
        "placeholder_token": None,
        "placeholder_token_id": None,
        "placeholder_token_ids": {},
        "placeholder_row_norms": {},
    }
    assert {name: baseline.meta[name] for name in expected} == expected
    assert list(read_zip(baseline.archive)) == [LORA_NAME, "meta.json"]


def test_the_log_says_what_happened_once_in_its_words(zero_prior):
    expected = [
        "Seed: 1",
        "Data set: 3 images, 2 captions found, 1 filled in with default_caption",
        "Buckets: 64x64: 2, 80x48: 1",
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Gradient mask active: only token 151665 receives updates",
        "Captions: 0 of 3 lacked the token and got it in front",
        "Prior preservation: prompts such as 'a photo of' keep what the base model generates for them",
        "Prompt 'a photo of <zwx>' tokenized to: [64, 6548, 315, 220, 151665]",
        "Prompt '<zwx> in a garden' tokenized to: [151665, 304, 264, 13551]",
        "Latents: 3 crops cached",
        "Text embeddings: 4 prompts cached",  # the captions without their token, and the empty one
        "LoRA: rank 4, 8192 parameters in 16 layers",
        f"Weights archive verified: 32 LoRA tensors, 1 embeddings, {zero_prior.archive.stat().st_size} bytes",
    ]
    assert [line for line in zero_prior.log if line in expected] == expected
    warnings = [line for line in zero_prior.log if line.startswith("Warning")]
    known = "Warning: 1 of 3 images have no caption", "Warning: the training did not"
    assert all(line.startswith(known) for line in warnings)  # the diagnostics': the training is that short


def test_a_baseline_says_what_is_not_used_without_a_token_and_caches_every_prompt(baseline):
    assert "Not used, since no placeholder token is trained: placeholder_token, prior_preservation" in baseline.log
    assert "Text embeddings: 4 prompts cached" in baseline.log  # three captions and the empty one
    assert not any("registered" in line or "Gradient mask" in line or "tokenized" in line for line in baseline.log)


PROGRESS = r" *(\d+)%\|[ #0-9]{10}\| (\d+)/15 \[\d\d:\d\d<\d\d:\d\d, *[\d.]+(?:it/s|s/it), loss=\d+\.\d{4}"


def lines_of(run: Run, more: str) -> list[re.Match]:
    return [found for line in run.log if (found := re.fullmatch(PROGRESS + more + r"\]", line))]


def test_each_step_of_a_short_training_has_a_progress_line(zero_prior, baseline):
    with_row, without = lines_of(zero_prior, r"(?:, preservation=\d+\.\d{4})?, row norm=([\d.e+-]+)"), lines_of(baseline, "")
    for lines in (with_row, without):
        assert [int(line[2]) for line in lines] == list(range(1, 16))
        assert [int(line[1]) for line in lines] == [round(100 * step / 15) for step in range(1, 16)]
    assert [int(line[2]) for line in with_row if "preservation" in line[0]] == [4, 8, 12]
    norms = [float(line[3]) for line in with_row]
    assert norms[0] < 0.002
    assert norms[-1] == pytest.approx(zero_prior.meta["placeholder_row_norms"]["<zwx>"][0], rel=0.01)


def test_a_long_training_has_about_a_hundred_progress_lines_with_the_mean_loss_between_them():
    log: list[str] = []
    steps = (Step(number, torch.tensor(float(number)), None, 0) for number in range(1, 1001))
    progress = Progress(1000, PlaceholderTokens(151665, {}, 32), log.append)
    for step in progress.timed(steps):
        progress.step(step)
    assert len(log) == 101
    assert log[0].startswith("  0%|          | 1/1000 [")
    assert log[37].startswith(" 37%|###       | 370/1000 [")
    assert log[37].endswith("loss=365.5000]")
    assert progress.figures()["loss"] == 995.5


@pytest.mark.parametrize("tokens", [("<zwx>",), ()])
def test_training_leaves_every_parameter_of_the_base_model_bit_identical(tokens, dataset, base, tmp_path):
    config = replace(ZERO_PRIOR, train_placeholder_token=bool(tokens), placeholder_token=tokens, steps=5)
    watched = WatchedBase.of(base)
    run = train(dataset, config, tmp_path / "weights.zip", watched)
    text_encoder = watched.loaded["text_encoder"].model.language_model
    for found, expected in ((text_encoder, load_text_encoder(base)), (watched.loaded["transformer"], load_transformer(base))):
        after, before = found.state_dict(), expected.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(parameter.grad is None for parameter in found.parameters())
    assert len(text_encoder.embed_tokens.weight) == 152064
    if tokens:
        (start,) = initial_embeddings(tokens, 32, 1e-5, torch.Generator().manual_seed(1)).values()
        row = run.tensors(ROW_NAME)["qwen25_7b"]
        assert (row - start).norm() > 10 * start.norm()


def test_the_same_seed_gives_the_same_archive_but_for_the_time_it_took(zero_prior, dataset, base, tmp_path):
    again = train(dataset, zero_prior.config, tmp_path / "again.zip", base)
    found, wanted = read_zip(again.archive), read_zip(zero_prior.archive)
    assert list(found) == list(wanted)
    differing = {name for name in again.meta if again.meta[name] != zero_prior.meta[name]}
    assert differing <= {"created", *MEASURED}
    del found["meta.json"], wanted["meta.json"]
    assert found == wanted


def test_what_meta_json_records_is_the_configuration_of_the_run(zero_prior, baseline):
    options = [name for names in YAML_SECTIONS.values() for name in names if name != "lora_rank"]
    for run in (zero_prior, baseline):
        recorded = json.loads(run.entry("meta.json"))
        found = train_config({name: recorded[name] for name in options})
        assert (replace(found, placeholder_token=()), found.tokens) == (
            replace(run.config, placeholder_token=(), torch_compile=False),  # as the rule decided
            run.config.tokens,
        )


def test_several_tokens_of_several_vectors_are_trained_and_come_back(base, tmp_path):
    dataset = write_dataset(tmp_path / "data.zip", ["<zwx> and <qrs>", "<qrs> alone", "<zwx> alone"])
    config = replace(ZERO_PRIOR, placeholder_token=("<zwx>", "<qrs>"), placeholder_vectors=2, seed=0, batch_size=2)
    run = train(dataset, config, tmp_path / "weights.zip", base)
    for line in (
        "Seed: 0",
        "Placeholder token '<zwx>' registered with ID: 151665, 151666",
        "Placeholder token '<qrs>' registered with ID: 151667, 151668",
        "Gradient mask active: only tokens 151665, 151666, 151667, 151668 receive updates",
    ):
        assert run.log.count(line) == 1
    assert run.meta["placeholder_token"] == "<zwx>,<qrs>"
    assert run.meta["placeholder_vectors"] == 2
    assert run.meta["placeholder_token_ids"] == {"<zwx>": [151665, 151666], "<qrs>": [151667, 151668]}
    rows = read_weights(run.archive).embeddings
    assert list(rows) == ["<zwx>", "<qrs>"]
    assert [row.shape for row in rows.values()] == [(2, 32), (2, 32)]
    learned = torch.cat(list(rows.values()))
    assert (learned.norm(dim=1) > 1e-3).all()
    assert len(torch.unique(learned, dim=0)) == 4


def test_a_caption_that_is_cut_before_its_token_is_refused_before_any_weight_is_loaded(base, tmp_path):
    late = "a harbor at dusk, " + "with many small boats, " * 110
    dataset = write_dataset(tmp_path / "data.zip", ["<zwx>", f"{late} in the style of <zwx>"])
    with pytest.raises(ValueError, match=r"the caption of 1\.png: 49 of 561 tokens are left out, among them <zwx> .*shorten"):
        train(dataset, ZERO_PRIOR, tmp_path / "weights.zip", WithoutWeights(base.source, base.device, base.dtype))
    dataset = write_dataset(tmp_path / "data.zip", ["<zwx>", f"<zwx>, {late}"])
    run = train(dataset, replace(ZERO_PRIOR, log_prompt_ids=True), tmp_path / "weights.zip", base)
    warning = "Warning: 1 of 2 captions are cut, 1.png: 45 of 557 tokens are left out (a prompt is cut after 512)"
    assert run.log.count(warning) == 1
    (ids,) = (line.split(" tokenized to: ")[1] for line in run.log if line.startswith("Prompt '<zwx>, a harbor"))
    assert len(json.loads(ids)) == 512


def test_a_row_that_starts_at_exact_zero_learns_and_captions_without_the_token_get_it_in_front(base, tmp_path):
    dataset = write_dataset(tmp_path / "data.zip", ["a cat", "a photo of <>", "the [trigger]"])
    config = replace(ZERO_PRIOR, placeholder_init_std=0.0, log_prompt_ids=True, caption_dropout=0.0, optimizer="prodigy")
    run = train(dataset, config, tmp_path / "weights.zip", base)
    assert "Captions: 1 of 3 lacked the token and got it in front" in run.log
    assert "Prompt '<zwx> a cat' tokenized to: [151665, 264, 8251]" in run.log
    assert "Prompt 'a photo of <zwx>' tokenized to: [64, 6548, 315, 220, 151665]" in run.log
    assert "Prodigy finds the LoRA's step size itself: learning_rate is not used" in run.log
    row = run.tensors(ROW_NAME)["qwen25_7b"]
    assert torch.isfinite(row).all()
    assert row.norm() > 1e-3


def test_the_row_is_limited_to_one_and_a_half_times_the_vocabularys_median(dataset, base, text_encoder, tmp_path):
    run = train(dataset, replace(ZERO_PRIOR, placeholder_learning_rate=1.0), tmp_path / "weights.zip", base)
    rms = run.tensors(ROW_NAME)["qwen25_7b"].square().mean().sqrt().item()
    median = text_encoder.embed_tokens.weight[:151665].square().mean(dim=1).sqrt().median().item()
    assert rms == pytest.approx(1.5 * median, rel=1e-3)
    assert rms == pytest.approx(token_rms_limit(text_encoder.embed_tokens.weight, 151665), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"quantize": True, "optimizer": "adamw8bit"}, "transformer"),
        ({"quantize_te": True, "optimizer": "adam8bit", "train_placeholder_token": False}, "text_encoder"),
    ],
)
def test_a_quantized_training_holds_8_bit_weights_and_gives_an_archive(options, name, dataset, base, tmp_path):
    watched = WatchedBase.of(base)
    run = train(dataset, replace(ZERO_PRIOR, batch_size=4, **options), tmp_path / "weights.zip", watched)
    for component in ("transformer", "text_encoder"):
        quantized = any(isinstance(module, Int8Linear) for module in watched.loaded[component].modules())
        assert quantized == (component == name)
    lora = read_weights(run.archive).lora
    assert any(value.any() for key, value in lora.items() if key.endswith(B))
    assert len(lines_of(run, ".*")) == 15


def test_a_loss_that_is_not_finite_stops_the_training_with_a_sentence(dataset, base, tmp_path):
    def poison(name, component):
        if name == "transformer":
            component.img_in.weight.data[0, 0] = float("nan")

    with pytest.raises(RuntimeError, match="the loss became nan by step 1: train again with a lower learning_rate or"):
        train(dataset, ZERO_PRIOR, tmp_path / "weights.zip", WatchedBase.of(base, change=poison))
    assert not (tmp_path / "weights.zip").exists()


@pytest.mark.parametrize(
    ("captions", "tokens", "sentence"),
    [
        (["a photo"], ("cat",), "'cat' is already a token of the vocabulary"),
        (["a photo"], ("a b",), "is empty or holds white space"),
        ([], ("<zwx>",), r"the data set holds no usable image \(it holds no file\)"),
    ],
)
def test_bad_input_is_refused_before_any_weight_is_loaded(captions, tokens, sentence, base, tmp_path):
    dataset, watched = write_dataset(tmp_path / "data.zip", captions), WatchedBase.of(base)
    with pytest.raises(ValueError, match=sentence):
        train(dataset, replace(ZERO_PRIOR, placeholder_token=tokens), tmp_path / "weights.zip", watched)
    assert set(watched.loaded) <= {"tokenizer"}


def test_an_output_without_room_for_the_lora_is_refused_before_the_first_step(dataset, base, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000 if folder == tmp_path else 10**12))
    with pytest.raises(RuntimeError, match="the disk of .* has 0 MB free, the archive needs 0 MB: make room, or name another"):
        finetune_module.finetune(Job(dataset, TrainConfig(**SHORT), tmp_path / "weights.zip"), base, lines.append)
    assert (
        any(line.startswith("LoRA: rank") for line in lines)
        and not any("%|" in line for line in lines)
        and not [*tmp_path.glob("weights*")]
    )


def test_an_unbracketed_token_is_warned_about_in_the_log(base, tmp_path):
    log: list[str] = []
    empty = write_dataset(tmp_path / "data.zip", [])
    with pytest.raises(ValueError, match="no usable image"):
        finetune_module.finetune(
            Job(empty, replace(ZERO_PRIOR, placeholder_token=("zwx",)), tmp_path / "w.zip"), base, log.append
        )
    assert [line for line in log if line.startswith("Warning: placeholder_token 'zwx' is split into [89, 20984]")]


class Proof:
    """What `verify_archive` is given after a training."""

    def __init__(self, run: Run, base, tokenizer, text_encoder):
        self.trained = read_weights(run.archive)
        tokens = PlaceholderTokens(151665, self.trained.embeddings, 32)
        latents = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        example = Example(latents, (4, 4), 0.5, prompt_ids(tokenizer, tokens, "a photo of <zwx>"))
        transformer = load_transformer(base)
        lora, sampler = add_lora(transformer, 4, 0), BatchSampler([example], (), 1, 0.0, torch.Generator())
        self.state = TrainState(Denoiser(transformer), PromptEncoder(text_encoder, tokens), lora, None, sampler, None, None)

    def __call__(self, archive: Path, trained: Weights | None = None) -> None:
        verify_archive(archive, trained or self.trained, self.state)


@pytest.fixture
def proof(zero_prior, base, tokenizer, text_encoder) -> Proof:
    return Proof(zero_prior, base, tokenizer, text_encoder)


def tampered(run: Run, path: Path, name: str, change) -> Path:
    """The archive with the tensors of one file changed."""
    entries = read_zip(run.archive)
    tensors = load(entries[name])
    change(tensors)
    return write_zip(path, entries | {name: save(tensors)})


def test_a_true_archive_is_verified_and_the_lora_taken_off(proof, zero_prior):
    proof(zero_prior.archive)
    assert not any("lora" in name for name, _ in proof.state.transformer.named_parameters())


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (ROW_NAME, lambda tensors: tensors["qwen25_7b"][0, 3].add_(1e-6), "embedding"),
        (LORA_NAME, lambda tensors: tensors[f"{LAYER}.lora_A.weight"][0, 0].add_(1), "LoRA"),
        (LORA_NAME, lambda tensors: [tensors.pop(f"{LAYER}.lora_{part}.weight") for part in "AB"], "LoRA"),
    ],
)
def test_an_archive_that_holds_something_else_is_not_verified(name, change, what, proof, zero_prior, tmp_path):
    path = tampered(zero_prior, tmp_path / "weights.zip", name, change)
    with pytest.raises(RuntimeError, match=f"the archive does not hold the {what} that was trained"):
        proof(path)


def test_a_lora_that_changes_nothing_is_not_verified(proof, zero_prior, tmp_path):
    def change(tensors):
        for key, value in tensors.items():
            if key.endswith(B):
                value.zero_()

    path = tampered(zero_prior, tmp_path / "weights.zip", LORA_NAME, change)
    with pytest.raises(RuntimeError, match="the stored LoRA does not change what the transformer predicts"):
        proof(path, read_weights(path))


def test_blocks_are_compiled_on_a_gpu_in_a_long_training_unless_told_otherwise():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long, short = (replace(ZERO_PRIOR, steps=steps) for steps in (COMPILED_FROM, COMPILED_FROM - 1))
    assert [compiles(config, device) for config in (long, short) for device in (gpu, cpu)] == [True, False, False, False]
    assert all(
        compiles(replace(config, torch_compile=wanted), gpu) == wanted for config in (long, short) for wanted in (True, False)
    )


def test_drawn_seeds_differ_and_a_given_one_is_kept_even_zero():
    drawn = {with_seed(replace(ZERO_PRIOR, seed=None), lambda _: None).seed for _ in range(5)}
    assert len(drawn) == 5
    assert all(0 <= seed < 2**32 for seed in drawn)
    log: list[str] = []
    assert with_seed(replace(ZERO_PRIOR, seed=0), log.append).seed == 0
    assert log == ["Seed: 0"]


@pytest.mark.parametrize("std", [1e-5, 0.5, 0.0])
def test_the_row_starts_as_large_as_asked(std, dataset, base, tmp_path):
    config = replace(ZERO_PRIOR, placeholder_init_std=std, placeholder_learning_rate=0.0, steps=2)
    row = train(dataset, config, tmp_path / "weights.zip", base).tensors(ROW_NAME)["qwen25_7b"]
    (start,) = initial_embeddings(("<zwx>",), 32, std, torch.Generator().manual_seed(1)).values()
    if std == 0.5:  # above the limit, which applies from the first step on
        assert row.norm() < start.norm()
        start *= row.norm() / start.norm()
    torch.testing.assert_close(row, start, rtol=1e-5, atol=0)

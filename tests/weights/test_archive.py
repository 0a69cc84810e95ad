"""The weights archive: what is written, that it comes back whole, and what is said about anything else."""

import json
import zipfile
from functools import partial

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load, save

from placeholder.lora.adapter import A, B
from placeholder.lora.safetensors import read_tensors
from placeholder.tokens.vocabulary import check_tokens
from placeholder.weights.archive import LORA_NAME, Weights, add_files, embedding_name, read_weights, write_weights
from tests.support.samples import read_zip, write_tar, write_zip

FIRST = "transformer_blocks.0.attn.to_q"
LORA = {FIRST + A: torch.full((4, 64), 0.5).bfloat16(), FIRST + B: torch.full((64, 4), 0.25).bfloat16()}
CONFIGURATION = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}
META = {"base_model": "some/model", "placeholder_token_ids": {"<zwx>": [151665], "<qrs>": [151666, 151667]}, "note": "é"}
WEIGHTS = Weights(LORA, {"<zwx>": torch.full((1, 32), 0.1), "<qrs>": torch.arange(64.0).view(2, 32)}, META)


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"transformer.{key}": value for key, value in state.items()}


GOOD = {
    LORA_NAME: save(prefixed(LORA)),
    "embeddings/zwx.safetensors": save({"qwen25_7b": torch.zeros(1, 32)}),
    "meta.json": json.dumps({"placeholder_token_ids": {"<zwx>": [151665]}}).encode(),
}


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "weights.zip"
    write_weights(path, WEIGHTS, CONFIGURATION)
    return path


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.meta == expected.meta
    for ours, theirs in ((found.lora, expected.lora), (found.embeddings, expected.embeddings)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) and ours[key].dtype == value.dtype for key, value in theirs.items())


def test_what_is_written_comes_back_bit_for_bit(archive):
    assert_same(read_weights(archive), WEIGHTS)


def test_the_archive_holds_the_files_that_others_read(archive):
    entries = read_zip(archive)
    assert list(entries) == [
        "embeddings/qrs.safetensors",
        "embeddings/zwx.safetensors",
        "lora/lora_weights.safetensors",
        "meta.json",
    ]
    row = load(entries["embeddings/zwx.safetensors"])
    assert list(row) == ["qwen25_7b"]
    assert (row["qwen25_7b"].shape, row["qwen25_7b"].dtype) == ((1, 32), torch.float32)
    assert json.loads(entries["meta.json"]) == META


def test_files_are_added_behind_the_rest_and_readers_pass_them_over(archive):
    before = read_zip(archive)
    add_files(archive, {"report/a.txt": b"a", "report/b/c.jpg": b"\xff"})
    assert list(read_zip(archive).items()) == [*before.items(), ("report/a.txt", b"a"), ("report/b/c.jpg", b"\xff")]
    assert_same(read_weights(archive), WEIGHTS)
    with zipfile.ZipFile(archive) as opened:
        assert {entry.compress_type for entry in opened.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_lora_file_is_the_one_that_diffusers_writes(archive, tmp_path):
    QwenImagePipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=LORA, transformer_lora_adapter_metadata=CONFIGURATION, weight_name="x.safetensors"
    )
    theirs = (tmp_path / "x.safetensors").read_bytes()
    found, expected = read_tensors("ours", read_zip(archive)[LORA_NAME]), read_tensors("theirs", theirs)
    assert found[1] == expected[1] and found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][key], value) for key, value in expected[0].items())


@pytest.mark.parametrize("title", ["", "x", "é" * 5, "a" * 1000])
def test_the_lora_file_has_our_metadata_too_sorted_and_aligned(title, tmp_path):
    path = tmp_path / "weights.zip"
    write_weights(path, WEIGHTS, CONFIGURATION, {"modelspec.title": title, "about": "b"})
    assert_same(read_weights(path), WEIGHTS)
    content = read_zip(path)[LORA_NAME]
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert length % 8 == 0
    assert list(metadata) == ["about", "format", "lora_adapter_metadata", "modelspec.title"]
    assert metadata["modelspec.title"] == title


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_a_bare_lora_is_read_whatever_its_suffix(suffix, tmp_path):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(GOOD[LORA_NAME])
    assert_same(read_weights(path), Weights(LORA))


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<zwx>", "zwx"),
        ("zwx", "zwx"),
        ("<Zwx-2_a>", "Zwx-2_a"),
        ("<a/b>", "a%2Fb"),
        ("<..>", "%2E%2E"),
        ("<a\\b>", "a%5Cb"),
        ("<é>", "%C3%A9"),
        ("<<x>>", "%3Cx%3E"),
    ],
)
def test_a_token_gives_its_file_a_safe_name(token, name):
    assert embedding_name(token) == f"embeddings/{name}.safetensors"


@pytest.mark.parametrize(
    "word", ["x" * 62, "絵" * 20, "é" * 31, "😀" * 15, "/." * 31], ids=["ascii", "kanji", "accent", "emoji", "path"]
)
def test_every_token_that_is_accepted_has_a_name_that_a_file_system_takes(word, tokenizer, tmp_path):
    token = f"<{word}>"
    check_tokens((token,), tokenizer)
    weights = Weights(LORA, {token: torch.zeros(1, 32)}, {"placeholder_token_ids": {token: [151665]}})
    write_weights(tmp_path / "weights.zip", weights, CONFIGURATION)
    assert_same(read_weights(tmp_path / "weights.zip"), weights)


def header_only(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, which may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def meta_of(**changed) -> bytes:
    return json.dumps({"placeholder_token_ids": {"<zwx>": [151665]}} | changed).encode()


ROW = torch.zeros(1, 32)
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
EMPTY, DOWN = TENSOR | {"data_offsets": [0, 0]}, next(iter(prefixed(LORA)))
UNUSABLE = "embeddings/zwx.safetensors holds no usable rows under 'qwen25_7b': expected finite"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({LORA_NAME: None}, "LoRA weights not found in weights.zip: expected lora/lora_weights.safetensors"),
        ({"meta.json": None}, "meta.json not found in weights.zip: give the archive as the training returned it"),
        ({"meta.json": b"{"}, "weights.zip: meta.json is not JSON"),
        ({"meta.json": b"[" * 100_000}, "weights.zip: meta.json is not JSON"),
        ({"meta.json": b"[]"}, "weights.zip: meta.json is not the one of a training"),
        ({"meta.json": b'{"placeholder_token_ids": 5}'}, "weights.zip: meta.json is not the one of a training"),
        ({"meta.json": b" " * 1_100_000}, "weights.zip: meta.json is 1100000 bytes"),
        (
            {"embeddings/zwx.safetensors": None},
            "the learned embedding of '<zwx>' was not found in weights.zip: expected embeddings/zwx.safetensors",
        ),
        ({"meta.json": b"{}"}, "holds embeddings/zwx.safetensors, a token that meta.json does not name"),
        ({"embeddings/zwx.safetensors": b"junk"}, "embeddings/zwx.safetensors is not a safetensors file"),
        ({"embeddings/zwx.safetensors": save({"other": torch.zeros(1, 32)})}, UNUSABLE),
        ({"embeddings/zwx.safetensors": save({"qwen25_7b": torch.zeros(32)})}, UNUSABLE),
        ({"embeddings/zwx.safetensors": save({"qwen25_7b": torch.zeros(65, 32)})}, UNUSABLE),
        ({"embeddings/zwx.safetensors": save({"qwen25_7b": torch.full((1, 32), float("nan"))})}, UNUSABLE),
        ({"embeddings/zwx.safetensors": save({"qwen25_7b": ROW.to(torch.int32)})}, UNUSABLE),
        (
            {"embeddings/zwx.safetensors": save({"qwen25_7b": ROW}, {"token": "<other>"})},
            "embeddings/zwx.safetensors holds the rows of '<other>', not of '<zwx>': it was renamed",
        ),
        ({"embeddings/zwx.safetensors": bytes(9_000_000)}, "is 9000000 bytes: an embedding has at most"),
        ({"meta.json": meta_of(placeholder_token_ids={"<zwx>": "151665"})}, "gives '<zwx>' the ids '151665': expected whole"),
        ({"meta.json": meta_of(placeholder_token_ids={"<zwx>": [2**70]})}, "gives '<zwx>' the ids .*: expected whole"),
        (
            {"meta.json": meta_of(placeholder_token_ids={"a\nb": [1]})},
            r"placeholder_token 'a\\nb' is empty or holds white space",
        ),
        ({"meta.json": meta_of(placeholder_token_ids={"x" * 99: [1]})}, "placeholder_token .* has 99 bytes"),
        ({"meta.json": meta_of(placeholder_token_ids={f"<{n}>": [n] for n in range(65)})}, "names 65 tokens: at most 64"),
        (
            {"meta.json": meta_of(placeholder_token_ids={"<zwx>": [151665], "zwx": [151666]})},
            "names '<zwx>' and 'zwx', which have the same file: train with one of them",
        ),
        ({"meta.json": meta_of(base_model=["a"])}, r"meta.json has the base_model \['a'\]: expected a name"),
        ({"meta.json": meta_of(base_model="\x1b[31m")}, r"meta.json has the base_model '\\x1b\[31m': expected a name"),
        ({LORA_NAME: header_only({"x": TENSOR | {"shape": [2**63]}}, b"1234")}, "is not a safetensors file"),
        ({LORA_NAME: header_only({DOWN: EMPTY | {"shape": [0, 2**62, 2**62]}})}, "is not a safetensors file"),
        ({LORA_NAME: header_only({DOWN: EMPTY | {"shape": [0] * 100}})}, "expected two dimensions"),
        ({LORA_NAME: header_only({"x": TENSOR, "y": TENSOR}, b"1234")}, "is not a safetensors file"),
        ({LORA_NAME: header_only({"__metadata__": None})}, "holds no weights"),
        ({LORA_NAME: header_only([])}, "is not a safetensors file"),
        ({LORA_NAME: header_only(b'{"a":' * 90_000)}, "is not a safetensors file"),
        ({LORA_NAME: header_only({}, length=2**62)}, "its header claims 4611686018427387904 bytes, at most 4194304 are read"),
        ({LORA_NAME: save(prefixed(LORA))[:-9]}, "is not a safetensors file"),
        (
            {LORA_NAME: save(prefixed(LORA) | {"transformer.norm.bias": ROW})},
            "holds 'transf.*bias', which is no weight of a LoRA",
        ),
    ],
)
def test_an_archive_in_which_something_is_wrong_gets_its_sentence(changed, sentence, tmp_path):
    entries = {name: content for name, content in (GOOD | changed).items() if content is not None}
    with pytest.raises(ValueError, match=sentence):
        read_weights(write_zip(tmp_path / "weights.zip", entries))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (GOOD[LORA_NAME][:100], r"w\.zip is not a safetensors file \("),
        (GOOD[LORA_NAME][:600], r"w\.zip is not a safetensors file \("),
        (b"no weights", r"w\.zip is neither a zip nor a tar archive"),
        (b"<!doctype html><html>log in</html>", r"^w.zip is a web page, not the file: give a direct link$"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_kind_gets_its_sentence(content, sentence, tmp_path):
    path = tmp_path / "w.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_weights(path)


def test_a_base_model_given_as_a_lora_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD[LORA_NAME])
    monkeypatch.setattr("placeholder.lora.formats.MAX_FILE_BYTES", 100)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"model\.safetensors is \d+ bytes: a LoRA has at most 100, is it a base model\?"):
        read_weights(path)


@pytest.mark.parametrize("name", ["none.zip", ""])
def test_weights_that_are_not_there_get_their_sentence(name, tmp_path):
    with pytest.raises(ValueError, match="are not a file: give a weights.zip or .* https://huggingface.co/owner/name/resolve"):
        read_weights(tmp_path / name)


def repacked(entries: dict[str, bytes], top: str) -> dict[str, bytes]:
    """The files in a folder, with what Finder, Explorer and exFAT leave beside them."""
    found = {f"{top}{name}": content for name, content in entries.items()}
    clutter = ("embeddings/.DS_Store", "embeddings/._zwx.safetensors", "lora/desktop.ini", "Thumbs.db")
    return found | {f"{top}{name}": b"\0" for name in clutter} | {f"__MACOSX/{top}._meta.json": b"\0"}


@pytest.mark.parametrize("top", ["", "./", "weights/", "a/b c/"])
@pytest.mark.parametrize("write", [write_zip, write_tar, partial(write_tar, mode="w:gz")])
def test_an_archive_that_was_unpacked_and_packed_again_is_the_same(write, top, archive, tmp_path):
    assert_same(read_weights(write(tmp_path / "again.bin", repacked(read_zip(archive), top))), WEIGHTS)


@pytest.mark.parametrize("inside", ["", "my_lora/"])
def test_a_lora_taken_out_of_its_archive_says_which_embedding_is_missing(inside, zero_prior, baseline, tmp_path):
    lora = zero_prior.entry(LORA_NAME)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(lora)
    if inside:
        path = write_zip(tmp_path / "lora.zip", {f"{inside}my_lora.safetensors": lora, f"{inside}config.yaml": b"a: 1"})
    found = read_weights(path)
    assert found.missing_tokens == ("<zwx>",)
    assert found.warnings() == [
        "the LoRA was trained with <zwx>, whose embedding is missing: give the whole weights.zip of that training"
    ]
    assert read_weights(zero_prior.archive).warnings() == read_weights(baseline.archive).warnings() == []
    path.write_bytes(baseline.entry(LORA_NAME))
    assert read_weights(path).warnings() == []

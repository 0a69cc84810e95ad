"""ComfyUI's node without ComfyUI: how a prompt is spliced for a stand-in of its tokenizer, and what is read from which file."""

import ast
import io
import json
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from demo.server import ROOT
from placeholder.lora.adapter import A, B
from placeholder.model.base import QWEN_IMAGE
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.weights.archive import Weights, embedding_name, write_weights
from tests.support.samples import read_zip, write_zip

WIDTH = 8
ROWS = {"<zwx>": torch.arange(16.0).view(2, WIDTH), "<q>": torch.ones(1, WIDTH)}
LORA = {"transformer_blocks.0.attn.to_q" + A: torch.ones(2, 4), "transformer_blocks.0.attn.to_q" + B: torch.ones(4, 2)}


class Folders(types.ModuleType):
    """ComfyUI's folder_paths, of one folder."""

    def __init__(self, root: Path):
        super().__init__("folder_paths")
        self.root = root

    def get_filename_list(self, kind: str) -> list[str]:
        return sorted(path.name for path in (self.root / kind).glob("*"))

    def get_full_path_or_raise(self, kind: str, name: str) -> str:
        return str(self.root / kind / name)

    def get_input_directory(self) -> str:
        return str(self.root / "input")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("comfyui")
    for name in ("embeddings", "input"):
        (root / name).mkdir()
    return Folders(root)


@pytest.fixture(scope="module")
def comfyui(folders):
    """The node's package, with a stand-in for the only module of ComfyUI that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "folder_paths", folders)
        import comfyui.node

        yield comfyui
    for name in [name for name in sys.modules if name.split(".")[0] == "comfyui"]:
        del sys.modules[name]


class Clip:
    """ComfyUI's CLIP as far as the node knows it: lists of (id, weight), padding for an empty text, a template."""

    def __init__(self, tokenizer):
        prefix, suffix = QWEN_IMAGE.prompt_prefix, QWEN_IMAGE.prompt_suffix
        self.tokenizer = types.SimpleNamespace(
            qwen25_7b=types.SimpleNamespace(embedding_size=WIDTH), llama_template=prefix + "{}" + suffix
        )
        self.plain = tokenizer

    def tokenize(self, text, llama_template=None):
        if not text.startswith("<|im_start|>"):
            text = (llama_template or self.tokenizer.llama_template).format(text)
        return {"qwen25_7b": [[(token_id, 1.0) for token_id in self.plain(text).input_ids or [151643]]]}

    def encode_from_tokens_scheduled(self, tokens):
        return tokens


@pytest.fixture(scope="module")
def clip(tokenizer):
    return Clip(tokenizer)


def ids_of(tokens, first_id: int) -> list[int]:
    """The token lists as ids, with those of training at our rows."""
    rows = torch.cat(list(ROWS.values()))
    [pairs] = tokens["qwen25_7b"]
    assert all(weight == 1.0 for _, weight in pairs)
    places = {tuple(row.tolist()): first_id + number for number, row in enumerate(rows)}
    return [places[tuple(value.tolist())] if isinstance(value, torch.Tensor) else value for value, _ in pairs]


PROMPTS = ["<zwx>", "<zwx> in a garden", "a photo of <zwx>", "<q><zwx>", "<ZWX> and zwx", "plain words", "", " "]
PROMPTS += ["a photo of <zwx>, and <zwx><q> (red:1.2) {x}", "a photo of(<q>)s  <zwx>\n"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_has_the_ids_of_training_with_rows_in_their_places(comfyui, clip, tokenizer, prompt):
    tokens = PlaceholderTokens(len(tokenizer), ROWS, WIDTH)
    spliced = comfyui.splice.tokenize(clip, prompt, ROWS)
    assert tuple(ids_of(spliced, len(tokenizer))) == prompt_ids(tokenizer, tokens, prompt)


def test_a_text_with_a_template_of_its_own_gets_no_other(comfyui, clip, tokenizer):
    spliced = comfyui.splice.tokenize(clip, "<|im_start|>user\n<q><|im_end|>", ROWS)
    expected = [*tokenizer("<|im_start|>user\n").input_ids, len(tokenizer) + 2, *tokenizer("<|im_end|>").input_ids]
    assert ids_of(spliced, len(tokenizer)) == expected


def test_another_models_clip_and_rows_are_refused(comfyui, clip, tokenizer):
    with pytest.raises(ValueError, match="not the text encoder of Qwen-Image: load it with CLIPLoader, type qwen_image"):
        comfyui.splice.tokenize(types.SimpleNamespace(tokenizer=types.SimpleNamespace(clip_l=1)), "x", {})
    with pytest.raises(ValueError, match="the rows of <zwx> have 9 numbers, this CLIP takes 8"):
        comfyui.splice.tokenize(clip, "x", {"<zwx>": torch.zeros(1, 9)})


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "weights.zip"
    write_weights(path, Weights(LORA, ROWS, {"placeholder_token_ids": {}}), {"r": 2, "lora_alpha": 2})
    return path


def read(comfyui, *given) -> dict[str, list]:
    """The rows by token, as numbers."""
    found = comfyui.rows.read_embeddings(*given)
    assert all(rows.dtype == torch.float32 for rows in found.values())
    return {token: rows.tolist() for token, rows in found.items()}


def test_an_archive_gives_all_its_tokens_or_the_one_that_is_named(comfyui, archive):
    rows = {token: value.tolist() for token, value in ROWS.items()}
    assert read(comfyui, archive) == rows
    assert read(comfyui, archive, "<q>") == {"<q>": rows["<q>"]}
    with pytest.raises(ValueError, match="weights.zip holds <q>, <zwx>, not <other>"):
        read(comfyui, archive, "<other>")


def test_an_archive_that_was_packed_again_is_read(comfyui, archive, tmp_path):
    entries = {f"weights/{name}": content for name, content in read_zip(archive).items()}
    path = write_zip(tmp_path / "again.zip", entries | {"weights/embeddings/._zwx.safetensors": b"x"})
    assert read(comfyui, path) == read(comfyui, archive)


def test_an_embedding_names_its_token_and_can_be_called_otherwise(comfyui, archive, tmp_path):
    path, rows = tmp_path / "zwx.safetensors", ROWS["<zwx>"].tolist()
    path.write_bytes(read_zip(archive)[embedding_name("<zwx>")])
    assert read(comfyui, path) == {"<zwx>": rows}
    assert read(comfyui, path, "<me>") == {"<me>": rows}
    path.write_bytes(save({"qwen25_7b": torch.zeros(1, WIDTH, dtype=torch.bfloat16)}))
    assert read(comfyui, path, "<me>") == {"<me>": [[0.0] * WIDTH]}
    with pytest.raises(ValueError, match="does not say which token it holds: write it into the node's token"):
        read(comfyui, path)


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = save({"qwen25_7b": torch.zeros(1, WIDTH)}, {"token": "<zwx>"})
NAME = "embeddings/zwx.safetensors"
HEADER = json.dumps({"qwen25_7b": {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}}).encode()
BAD = {
    "pickle": (b"\x80\x04K\x01.", "is not a safetensors file"),
    "empty file": (b"", "is not a safetensors file"),
    "cut": (GOOD[:-3], "is not a safetensors file"),
    "impossible shape": (len(HEADER).to_bytes(8, "little") + HEADER, "is not a safetensors file|no usable rows"),
    "other key": (save({"clip_l": torch.zeros(1, WIDTH)}), "holds no tensor 'qwen25_7b'"),
    "one dimension": (save({"qwen25_7b": torch.zeros(WIDTH)}), "no usable rows"),
    "whole numbers": (save({"qwen25_7b": torch.zeros(1, WIDTH, dtype=torch.int32)}), "no usable rows"),
    "not finite": (save({"qwen25_7b": torch.full((1, WIDTH), torch.nan)}), "no usable rows"),
    "too many rows": (save({"qwen25_7b": torch.zeros(65, WIDTH)}), "no usable rows"),
    "large": (bytes(9 * 1024**2), "more than 8388608 bytes"),
    "bomb": (zipped({NAME: bytes(64 * 1024**2)}, zipfile.ZIP_DEFLATED), "more than 8388608 bytes"),
    "baseline": (
        zipped({"lora/lora_weights.safetensors": b"", "meta.json": b"{}"}),
        "trained without a token, load its LoRA alone",
    ),
    "many files": (zipped({f"{number}": b"" for number in range(1001)}), "holds 1001 files"),
    "many tokens": (zipped({f"embeddings/{number}.safetensors": GOOD for number in range(65)}), "holds 65 tokens"),
    "a token twice": (zipped({NAME: GOOD, "embeddings/q.safetensors": GOOD}), "two of the same"),
    "damaged": (zipped({NAME: GOOD})[:-30], "is a damaged or encrypted archive"),
    "bytes changed": (zipped({NAME: GOOD}).replace(b"F32", b"F64"), "is a damaged or encrypted archive"),
    "encrypted": (
        zipped({NAME: GOOD}).replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        "encrypted",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_embedding_gets_its_sentence(comfyui, tmp_path, name):
    content, sentence = BAD[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        comfyui.rows.read_embeddings(path)


def test_the_node_reads_from_comfyuis_folders(comfyui, folders, clip, archive):
    node = comfyui.NODE_CLASS_MAPPINGS["QwenImagePlaceholderToken"]
    assert node.INPUT_TYPES()["required"]["embedding"][0] == ["none"]
    (folders.root / "embeddings" / "zwx.safetensors").write_bytes(GOOD)
    (folders.root / "embeddings" / "other.pt").write_bytes(b"")
    (folders.root / "input" / "weights.zip").write_bytes(archive.read_bytes())
    assert node.INPUT_TYPES()["required"]["embedding"][0] == ["none", "zwx.safetensors"]

    def rows(**inputs) -> list[list[float]]:
        [tokens] = node().encode(clip, "a <zwx> <q>", **inputs)
        return [value.tolist() for value, _ in tokens["qwen25_7b"][0] if isinstance(value, torch.Tensor)]

    both = torch.cat(list(ROWS.values())).tolist()
    assert rows(embedding="none") == []
    assert rows(embedding="zwx.safetensors") == [[0.0] * WIDTH]
    assert rows(embedding="none", archive="weights.zip") == rows(embedding="none", archive=f'"{archive}"') == both
    with pytest.raises(ValueError, match="are both given: choose one of them"):
        rows(embedding="zwx.safetensors", archive="weights.zip")
    with pytest.raises(ValueError, match="there is no CLIP"):
        node().encode(None, "x", "none")
    with pytest.raises(ValueError, match="none.zip is not a file"):
        rows(embedding="none", archive="none.zip")


def test_the_node_is_run_again_where_its_file_changed(comfyui, folders):
    node = comfyui.NODE_CLASS_MAPPINGS["QwenImagePlaceholderToken"]
    write_zip(folders.root / "input" / "changing.zip", {NAME: GOOD})
    before = node.IS_CHANGED(embedding="none", archive="changing.zip", text="a")
    assert node.IS_CHANGED(embedding="none", archive="changing.zip", text="b") == before
    write_zip(folders.root / "input" / "changing.zip", {NAME: GOOD, "x": b""})
    assert node.IS_CHANGED(embedding="none", archive="changing.zip") != before
    assert node.IS_CHANGED(embedding="none") == node.IS_CHANGED(embedding=None, archive=None) == "None"


def test_the_node_imports_nothing_of_this_package():
    found = set()
    for path in (ROOT / "comfyui").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "safetensors", "folder_paths"}


def test_the_workflow_uses_the_node_with_its_inputs(comfyui):
    workflow = json.loads((ROOT / "comfyui" / "workflow.json").read_text())
    used = [node["inputs"] for node in workflow.values() if node["class_type"] in comfyui.NODE_CLASS_MAPPINGS]
    known = comfyui.node.QwenImagePlaceholderToken.INPUT_TYPES()
    assert len(used) == 2
    assert all(inputs.keys() == known["required"].keys() | known["optional"].keys() for inputs in used)


def test_the_readme_states_what_the_check_has_found():
    check = json.loads((ROOT / "comfyui" / "check.json").read_text())
    readme = " ".join((ROOT / "comfyui" / "README.md").read_text().split())
    prompts, predictions = check["largest_difference_of_conditioning"], check["largest_difference_of_prediction"]
    assert f"ComfyUI {check['comfyui']} on the CPU" in readme
    assert f"for {len(prompts)} prompts" in readme
    assert f"by at most {max(prompts.values()):.1e}".replace("e-0", "e-") in readme
    assert f"it differs by {check['smallest_with_the_row_turned_around']:.1f} or more" in readme
    lora = check["lora"]
    assert f"each of {lora['layers']} layers by B A (largest difference {lora['largest_difference_of_a_weight']})" in readme
    assert f"{check['lora_of_full_size']['loaded']} keys, into {check['lora_of_full_size']['layers']} layers" in readme
    assert f"differs by {predictions['lora']:.1e} from".replace("e-0", "e-") in readme
    assert f"changes it by {predictions['lora from base']:.3f}" in readme

"""Uploading to the hub: through the real client, to a hub of our own on this machine."""

import base64
import json
from http.server import BaseHTTPRequestHandler

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from placeholder.report.hub import HubRepository, model_card
from placeholder.weights.archive import read_weights
from tests.support.samples import read_zip, write_zip
from tests.support.serving import serving

REPO, TOKEN = "someone/subject", "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to make a repository and commit small files."""

    files: dict[str, bytes] = {}
    created: list[dict] = []
    refused: set[str] = set()

    def do_GET(self) -> None:
        """Asked whether the token may write, and what is there."""
        tree = [{"type": "file", "path": name, "oid": "", "size": len(content)} for name, content in self.files.items()]
        self._answer(tree if "/tree/" in self.path else {})

    def do_POST(self) -> None:
        """Make, ask how to upload, commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer({"url": f"https://huggingface.co/{REPO}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del self.files[entry["value"]["path"]]
            self._answer({"commitUrl": f"https://huggingface.co/{REPO}/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: dict) -> None:
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}" and not any(part in self.path for part in self.refused)
        body = json.dumps(content if allowed else {"error": "no"}).encode()
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """The address of a hub that knows TOKEN alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "created", [])
    monkeypatch.setattr(Hub, "refused", set())
    with serving(Hub) as address:
        yield address


def test_the_archive_is_uploaded_with_a_card_and_without_the_photographs(hub, zero_prior, tmp_path):
    entries = read_zip(zero_prior.archive)
    reported = {"report/grid.jpg": b"grid", "report/dataset/001.jpg": b"a photograph", "report/index.html": b"captions"}
    archive = write_zip(tmp_path / "weights.zip", entries | reported)
    repository, log = HubRepository(REPO, TOKEN, hub), []
    Hub.files |= {"embeddings/old.safetensors": b"of an earlier training", "notes.txt": b"by hand"}
    repository.check()
    repository.upload(archive, log.append)
    assert [made["visibility"] for made in Hub.created] == ["private"]
    assert log == [f"Uploaded to https://huggingface.co/{REPO}/commit/1; removed there: embeddings/old.safetensors"]
    stored = {"embeddings/zwx.safetensors", "lora_weights.safetensors", "meta.json", "report/grid.jpg"}
    assert set(Hub.files) == {"README.md", "notes.txt", *stored}
    found = read_weights(write_zip(tmp_path / "repository.zip", Hub.files))
    assert torch.equal(found.embeddings["<zwx>"], read_weights(zero_prior.archive).embeddings["<zwx>"])
    assert Hub.files["lora_weights.safetensors"] == entries["lora/lora_weights.safetensors"]
    assert Hub.files["embeddings/zwx.safetensors"] == entries["embeddings/zwx.safetensors"]
    card = Hub.files["README.md"].decode()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder, which the hub would refuse
    assert "not on the hub" in card and "```" not in card
    assert "| rank | 4 |" in card and "curve.png" not in card


@pytest.mark.parametrize(("kind", "tokens"), [("zero_prior", True), ("baseline", False)])
def test_the_hub_reads_the_cards_front_matter_and_a_person_the_rest(kind, tokens, request):
    meta = request.getfixturevalue(kind).meta | {"base_model": "Qwen/Qwen-Image"}
    card = ModelCard(model_card(meta, REPO, ["report/grid.jpg", "report/curve.png"]), ignore_metadata_errors=False)
    front, prompt = card.data, "a photo of <zwx>" if tokens else "A photo of a person"
    assert (front.base_model, front.library_name, front.license) == ("Qwen/Qwen-Image", "diffusers", "apache-2.0")
    assert (front.pipeline_tag, front.instance_prompt) == ("text-to-image", prompt)
    assert front.widget[0]["output"] == {"url": "report/grid.jpg"}
    assert "![Before and after the training; the prompts stand in the image](report/grid.jpg)" in card.text
    assert card.text.count("![") == 2
    assert ("AddedToken" in card.text) == ("`<zwx>`, new to the tokenizer" in card.text) == tokens


def test_a_card_of_a_token_with_several_embeddings_shows_no_code(zero_prior):
    several = zero_prior.meta | {"base_model": "Qwen/Qwen-Image", "placeholder_token_ids": {"<zwx>": [151665, 151666]}}
    assert "```" not in model_card(several, REPO, [])


def test_the_cards_code_generates_with_what_was_uploaded(hub, zero_prior, base, monkeypatch, tmp_path):
    HubRepository(REPO, TOKEN, hub).upload(zero_prior.archive, lambda line: None)
    for name, content in Hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    card = model_card(zero_prior.meta | {"base_model": "Qwen/Qwen-Image"}, REPO, [])
    code = card.split("```python\n")[1].split("\n```")[0]
    for old, new in (
        ('"Qwen/Qwen-Image", dtype=torch.bfloat16).to("cuda")', f"{base.source!r}, dtype=torch.float32)"),
        (f'snapshot_download("{REPO}")', repr(str(tmp_path))),
        ("true_cfg_scale=4.0", "true_cfg_scale=4.0, num_inference_steps=2, width=64, height=64"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    found: dict = {}
    exec(code, found)
    matrix = found["pipe"].text_encoder.get_input_embeddings().weight
    assert torch.equal(matrix[151665], zero_prior.tensors("embeddings/zwx.safetensors")["qwen25_7b"][0])
    assert found["pipe"].tokenizer("a photo of <zwx>").input_ids == [64, 6548, 315, 220, 151665]
    assert found["pipe"].get_active_adapters() == ["default_0"]
    assert found["image"].size == (64, 64)


@pytest.mark.parametrize("refused", [{"repos/create", "/api/models"}, {"auth-check"}])
def test_a_token_that_may_not_write_is_refused_before_the_training(refused, hub):
    Hub.refused = refused
    with pytest.raises(ValueError, match=r"hf_repo_id someone/subject cannot be written \(HTTP status 403\): give an hf_token"):
        HubRepository(REPO, TOKEN, hub).check()


def test_a_hub_that_cannot_be_reached_gets_its_sentence(hub):
    with pytest.raises(ValueError, match=r"cannot be written \(ConnectError\)"):
        HubRepository(REPO, TOKEN, "http://127.0.0.1:9").check()


def test_an_upload_that_fails_is_a_warning_and_shows_no_token(hub, zero_prior):
    Hub.refused, log = {"/commit/"}, []
    HubRepository(REPO, TOKEN, hub).upload(zero_prior.archive, log.append)
    (line,) = log
    assert line.startswith(f"Warning: the upload to {REPO} failed (HTTP status 403)")
    assert TOKEN not in line


def test_bad_inputs_get_their_sentence_and_a_token_is_never_shown():
    for repo_id, token, sentence in (
        ("no slash", TOKEN, "hf_repo_id is 'no slash': give owner/name"),
        (REPO, None, "hf_repo_id needs an hf_token"),
        (None, TOKEN, "hf_token is given without hf_repo_id"),
    ):
        with pytest.raises(ValueError, match=sentence):
            HubRepository.of(repo_id, token)
    assert HubRepository.of(None, None) is None
    assert TOKEN not in repr(HubRepository.of(REPO, TOKEN))

"""Uploading a weights archive to the Hugging Face Hub with a model card; access is checked before the training."""

import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from placeholder.config import WITHOUT_TOKEN
from placeholder.errors import Log
from placeholder.weights.layout import EMBEDDINGS_FOLDER, HUB_LORA_NAME, LORA_NAME, META_NAME, embedding_name

CARD = Path(__file__).with_name("model_card.md.jinja")
GRID, CURVE = "report/grid.jpg", "report/curve.png"
SHOWN = re.compile(r"report/(grid\.jpg|curve\.png|samples/[^/]+\.jpg)")  # the photographs trained on are not uploaded
BASE_LICENSE = "apache-2.0"  # of Qwen/Qwen-Image, from which the LoRA is derived
# Of the hub, the connection, the card's front matter, large files and the disk.
UPLOAD_ERRORS = (HfHubHTTPError, HTTPError, ValueError, RuntimeError, OSError)


@dataclass(frozen=True)
class HubRepository:
    """A repository `owner/name` and a token that may write there. The token is never shown."""

    repo_id: str
    token: str = field(repr=False)
    endpoint: str | None = None

    @classmethod
    def of(cls, repo_id: str | None, token: str | None) -> "HubRepository | None":
        """The repository that the inputs name; None without one. Raises ValueError for a bad name or a missing token."""
        if not repo_id:
            if token:
                raise ValueError("hf_token is given without hf_repo_id: name the repository as owner/name")
            return None
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo_id):
            raise ValueError(f"hf_repo_id is {repo_id[:200]!r}: give owner/name")
        if not token:
            raise ValueError(
                "hf_repo_id needs an hf_token that may write there (on the command line: the environment variable HF_TOKEN)"
            )
        return cls(repo_id, token)

    def check(self) -> None:
        """Create the repository, private, unless it exists. Raises ValueError where the token may not write to it."""
        try:
            self._api().create_repo(self.repo_id, private=True, exist_ok=True)
            self._api().auth_check(self.repo_id, write=True)
        except (HfHubHTTPError, HTTPError) as error:
            raise ValueError(
                f"hf_repo_id {self.repo_id} cannot be written ({_reason(error)}): give an hf_token that may write there"
            ) from None

    def upload(self, archive: Path, log: Log) -> None:
        """Upload what the archive holds. A failure is a warning in the log: the archive is returned in any case."""
        try:
            api, added = self._api(), _operations(archive, self.repo_id)
            stored = {name for name in api.list_repo_files(self.repo_id) if name.startswith(EMBEDDINGS_FOLDER + "/")}
            stale = sorted(stored - {file.path_in_repo for file in added})  # of tokens that meta.json no longer names
            operations = [*added, *map(CommitOperationDelete, stale)]
            commit = api.create_commit(self.repo_id, operations, commit_message="Upload LoRA")
        except UPLOAD_ERRORS as error:
            log(f"Warning: the upload to {self.repo_id} failed ({_reason(error)}): the archive itself is returned as always")
        else:
            log(f"Uploaded to {commit.commit_url}" + f"; removed there: {', '.join(stale)}" * bool(stale))

    def _api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"HTTP status {response.status_code}"


def _operations(archive: Path, repo_id: str) -> list[CommitOperationAdd]:
    with zipfile.ZipFile(archive) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    shown = [name for name in files if SHOWN.fullmatch(name)]
    embeddings = [name for name in files if name.startswith(EMBEDDINGS_FOLDER + "/")]
    uploaded = {name: files[name] for name in (META_NAME, *embeddings, *shown)} | {HUB_LORA_NAME: files[LORA_NAME]}
    uploaded["README.md"] = model_card(json.loads(files[META_NAME]), repo_id, shown).encode()
    return [CommitOperationAdd(name, content) for name, content in sorted(uploaded.items())]


def model_card(meta: dict[str, Any], repo_id: str, images: list[str]) -> str:
    """The README.md of the repository, from what meta.json holds and the names of the images next to it.

    It shows code where the base model is on the hub and every token has one embedding.
    """
    tokens, base, filled = meta["placeholder_token_ids"], meta["base_model"], meta["default_caption"]
    base = base if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists() else None
    caption = "Before and after the training; the prompts stand in the image"
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=BASE_LICENSE,
        instance_prompt=f"a photo of {next(iter(tokens))}" if tokens else WITHOUT_TOKEN.get(filled, filled),
        tags=["text-to-image", "diffusers", "lora", "qwen-image", "template:sd-lora"],
        widget=[{"text": caption, "output": {"url": GRID}}] if GRID in images else [],
    )
    card = ModelCard.from_template(
        data,
        str(CARD),
        base_model=base,
        repo_id=repo_id,
        meta=meta,
        tokens=list(tokens),
        embeddings=[(token, ids[0], embedding_name(token)) for token, ids in tokens.items()],
        code=base and all(len(ids) == 1 for ids in tokens.values()),
        lora_file=HUB_LORA_NAME,
        grid=GRID if GRID in images else None,
        grid_caption=caption,
        curve=CURVE if CURVE in images else None,
    )
    return str(card)

"""Uploading a trained archive to the Hugging Face hub, with a model card; checked before the training, done after it."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from placeholder.report.card import model_card
from placeholder.weights.archive import EMBEDDINGS_FOLDER, LORA_NAME, META_NAME

Log = Callable[[str], None]
# Pictures that the model has drawn. The photographs it was trained on stay with the user.
SHOWN = re.compile(r"report/(grid\.jpg|curve\.png|samples/[^/]+\.jpg)")


# What the client raises: of the hub, of the connection, of the card's front matter, of large files and of the disk.
UPLOAD_ERRORS = (HfHubHTTPError, HTTPError, ValueError, RuntimeError, OSError)


@dataclass(frozen=True)
class HubRepository:
    """Where to upload: `owner/name` and a token that may write there. The token is never shown."""

    repo_id: str
    token: str = field(repr=False)
    endpoint: str | None = None

    @classmethod
    def of(cls, repo_id: str | None, token: str | None) -> "HubRepository | None":
        """The repository that the inputs ask for; None without one. Raises ValueError for a bad name or a missing token."""
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
        """Make the repository, private, unless it is there. Raises ValueError where the token may not write to it."""
        try:
            self._api().create_repo(self.repo_id, private=True, exist_ok=True)
            self._api().auth_check(self.repo_id, write=True)
        except (HfHubHTTPError, HTTPError) as error:
            raise ValueError(
                f"hf_repo_id {self.repo_id} cannot be written ({_reason(error)}): give an hf_token that may write there"
            ) from None

    def upload(self, archive: Path, log: Log) -> None:
        """Upload what the archive holds; the training is not lost where that fails, the log says so."""
        try:
            commit = self._api().create_commit(self.repo_id, _operations(archive, self.repo_id), commit_message="Upload LoRA")
        except UPLOAD_ERRORS as error:
            log(f"Warning: the upload to {self.repo_id} failed ({_reason(error)}): the archive itself is returned as always")
        else:
            log(f"Uploaded to {commit.commit_url}")

    def _api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"HTTP status {response.status_code}"


def _operations(archive: Path, repo_id: str) -> list[CommitOperationAdd]:
    with zipfile.ZipFile(archive) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    shown = [name for name in files if SHOWN.fullmatch(name)]
    kept = {name: files[name] for name in files if name.startswith(EMBEDDINGS_FOLDER + "/")}
    kept |= {name: files[name] for name in (META_NAME, *shown)}
    # At the root, where load_lora_weights(repo_id) looks.
    kept[PurePosixPath(LORA_NAME).name] = files[LORA_NAME]
    kept["README.md"] = model_card(json.loads(files[META_NAME]), repo_id, shown).encode()
    return [CommitOperationAdd(name, io.BytesIO(content)) for name, content in sorted(kept.items())]

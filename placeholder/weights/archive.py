"""The weights archive: the LoRA, the learned embeddings and meta.json in one file; written here and read here."""

import hashlib
import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from placeholder.config import MAX_VECTORS
from placeholder.data.archive import open_archive
from placeholder.data.entries import Archive, unwrapped
from placeholder.errors import HEAD_BYTES, check_download, label, listed, quoted, reason, shown
from placeholder.lora.adapter import DTYPES, PREFIX
from placeholder.lora.formats import METADATA_KEY, lora_alone, read_lora, read_lora_file
from placeholder.lora.safetensors import looks_like_safetensors, read_tensors
from placeholder.model.base import QWEN_IMAGE
from placeholder.tokens.vocabulary import MAX_TOKENS, check_word
from placeholder.weights.layout import EMBEDDINGS_FOLDER, HUB_LORA_NAME, LORA_NAME, META_NAME, embedding_name

EMBEDDING_KEY = QWEN_IMAGE.embedding_key
HEADER_MULTIPLE = 8  # the tensors behind the header are aligned to so many bytes (the format's description)
PEFT_CONFIG_NAME = "adapter_config.json"  # PEFT writes it beside adapter_model.safetensors
MAX_META_BYTES = 1024 * 1024
MAX_BASE_MODEL_CHARACTERS = 1000
MAX_ID = 2**31  # of a token
MAX_EMBEDDING_BYTES = 8 * 1024**2  # 64 rows of 8192 numbers in fp32 have a quarter of that


@dataclass(frozen=True)
class Weights:
    """What an archive holds: the LoRA with alpha = rank and keys without `transformer.`, rows (k, D) by token, meta.json."""

    lora: dict[str, Tensor]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    missing_tokens: tuple[str, ...] = ()  # of a LoRA alone, whose embeddings are not in the file

    def warnings(self) -> list[str]:
        """What is missing of what the training made, in words."""
        if not self.missing_tokens:
            return []
        tokens = ", ".join(self.missing_tokens)
        return [f"the LoRA was trained with {tokens}, whose embedding is missing: give the whole weights.zip of that training"]

    def renamed(self, names: tuple[str, ...]) -> "Weights":
        """The same with other names for its tokens, in their order; ValueError for another number of them."""
        if not names:
            return self
        if len(names) != len(self.embeddings):
            known = ", ".join(self.embeddings) or "no token"
            raise ValueError(f"extra_placeholder_token gives {len(names)} names, extra_lora_weights have {known}: one for each")
        ids = dict(zip(names, self.meta["placeholder_token_ids"].values(), strict=True))
        embeddings = dict(zip(names, self.embeddings.values(), strict=True))
        return replace(self, embeddings=embeddings, meta=self.meta | {"placeholder_token_ids": ids})


def write_weights(path: Path, weights: Weights, lora_metadata: dict[str, Any], header: dict[str, str] | None = None) -> None:
    """Write the archive; `lora_metadata` is the PEFT configuration of the LoRA (alpha = rank).

    The LoRA's file is that of diffusers' `save_lora_weights`, with `header` added to its metadata. Entries are not compressed
    (bf16 noise does not shrink), sorted, and without a time of their own: equal weights and meta.json give equal bytes.
    """
    lora = {PREFIX + key: value for key, value in weights.lora.items()}
    peft = {PREFIX + key: value for key, value in lora_metadata.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(peft, indent=2, sort_keys=True)} | (header or {})
    files = {
        embedding_name(token): _safetensors({EMBEDDING_KEY: rows.contiguous()}, {"format": "pt", "token": token})
        for token, rows in weights.embeddings.items()
    }
    files[LORA_NAME] = _safetensors(lora, metadata)
    files[META_NAME] = (json.dumps(weights.meta, indent=2, ensure_ascii=False) + "\n").encode()
    path.unlink(missing_ok=True)
    add_files(path, dict(sorted(files.items())))


def add_files(path: Path, files: dict[str, bytes]) -> None:
    """Append files to an archive, uncompressed and without a time of their own."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its metadata sorted by name; the library writes them in random order."""
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(content[8:start])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // HEADER_MULTIPLE) * HEADER_MULTIPLE)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


def read_weights(path: Path | str) -> Weights:
    """Read a weights archive (zip or tar; also of a repository on the hub), another trainer's, or a bare LoRA, by content.

    Raises ValueError, one sentence, when something that belongs there is missing, damaged or of another kind.
    """
    path = _existing(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    check_download(label(path.name), head)
    if looks_like_safetensors(head[:9]):
        found = read_lora_file(label(path.name), path)
        return Weights(found.lora, missing_tokens=found.tokens)
    with open_archive(path) as archive:
        archive = unwrapped(archive, (META_NAME, LORA_NAME))
        if not any(name in (META_NAME, LORA_NAME) or name.startswith(EMBEDDINGS_FOLDER + "/") for name in archive.names):
            return _foreign(archive)
        lora_name = next((name for name in (LORA_NAME, HUB_LORA_NAME) if name in archive.names), None)
        if lora_name is None:
            raise ValueError(f"LoRA weights not found in {archive.name}: expected {LORA_NAME}")
        if META_NAME not in archive.names:
            raise ValueError(f"{META_NAME} not found in {archive.name}: give the archive as the training returned it")
        meta = _meta(archive)
        lora = read_lora(f"{archive.name}: {lora_name}", archive.read(lora_name))
        return Weights(lora, _embeddings(archive, meta), meta)


def content_digest(path: Path | str) -> str:
    """The SHA-256 of the file, by which an archive is known again under another name; ValueError where there is none."""
    with _existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"the weights {label(path.name or str(path))} are not a file: give a weights.zip or a LoRA in safetensors, by path "
            "or URL; of a repository on the Hub that is https://huggingface.co/owner/name/resolve/main/file.safetensors"
        )
    return path


def _foreign(archive: Archive) -> Weights:
    """The LoRA in an archive of another trainer: its only safetensors file."""
    files = [name for name in archive.names if name.lower().endswith(".safetensors")]
    if len(files) != 1:
        found = listed([quoted(name) for name in files], 3) or "no safetensors file"
        raise ValueError(
            f"LoRA weights not found in {archive.name}: expected {LORA_NAME}, or one LoRA in safetensors, found {found}"
            + (": give the one that is wanted" if files else "")
        )
    config = str(PurePosixPath(files[0]).with_name(PEFT_CONFIG_NAME))
    if config in archive.names and (size := archive.size(config)) > MAX_META_BYTES:
        raise ValueError(f"{archive.name}: {label(config)} is {size} bytes: it has at most {MAX_META_BYTES}")
    content = archive.read(config) if config in archive.names else None
    found = lora_alone(f"{archive.name}: {label(files[0])}", archive.read(files[0]), content)
    return Weights(found.lora, missing_tokens=found.tokens)


def _meta(archive: Archive) -> dict[str, Any]:
    """What meta.json holds, with the types of what a prediction reads of it checked."""
    name, advice = archive.name, "give the archive as the training returned it"
    if (size := archive.size(META_NAME)) > MAX_META_BYTES:
        raise ValueError(f"{name}: {META_NAME} is {size} bytes: it has at most {MAX_META_BYTES}")
    try:
        meta = json.loads(archive.read(META_NAME).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {META_NAME} is not JSON ({reason(error)}): {advice}") from error
    token_ids = meta.get("placeholder_token_ids", {}) if isinstance(meta, dict) else None
    if not isinstance(token_ids, dict):
        raise ValueError(f"{name}: {META_NAME} is not the one of a training: {advice}")
    base_model = meta.get("base_model", "")
    if not isinstance(base_model, str) or not base_model.isprintable() or len(base_model) > MAX_BASE_MODEL_CHARACTERS:
        raise ValueError(f"{name}: {META_NAME} has the base_model {shown(base_model)}: expected a name, {advice}")
    if len(token_ids) > MAX_TOKENS:
        raise ValueError(f"{name}: {META_NAME} names {len(token_ids)} tokens: at most {MAX_TOKENS} are read")
    for token, ids in token_ids.items():
        check_word(token)
        if not isinstance(ids, list) or not all(type(token_id) is int and 0 <= token_id < MAX_ID for token_id in ids):
            raise ValueError(f"{name}: {META_NAME} gives {token!r} the ids {shown(ids)}: expected whole numbers, {advice}")
    return meta


def _embeddings(archive: Archive, meta: dict[str, Any]) -> dict[str, Tensor]:
    """The rows of every token that meta.json names, and no others."""
    expected: dict[str, str] = {}
    for token in meta.get("placeholder_token_ids", {}):
        other = expected.setdefault(embedding_name(token), token)
        if other != token:
            raise ValueError(f"{archive.name} names {other!r} and {token!r}, which have the same file: train with one of them")
    stored = {name for name in archive.names if name.startswith(EMBEDDINGS_FOLDER + "/")}
    if missing := sorted(expected.keys() - stored):
        raise ValueError(
            f"the learned embedding of {expected[missing[0]]!r} was not found in {archive.name}: expected {missing[0]}"
        )
    if unnamed := sorted(stored - expected.keys()):
        raise ValueError(f"{archive.name} holds {label(unnamed[0])}, a token that {META_NAME} does not name: it was changed")
    return {token: _rows(archive, name, token) for name, token in expected.items()}


def _rows(archive: Archive, name: str, token: str) -> Tensor:
    if (size := archive.size(name)) > MAX_EMBEDDING_BYTES:
        raise ValueError(f"{archive.name}: {name} is {size} bytes: an embedding has at most {MAX_EMBEDDING_BYTES}")
    tensors, metadata = read_tensors(f"{archive.name}: {name}", archive.read(name))
    if (named := metadata.get("token", token)) != token:
        raise ValueError(f"{archive.name}: {name} holds the rows of {shown(named)}, not of {token!r}: it was renamed")
    rows = tensors.get(EMBEDDING_KEY)
    usable = rows is not None and rows.dtype in DTYPES and rows.ndim == 2 and 1 <= len(rows) <= MAX_VECTORS
    if not usable or not torch.isfinite(rows).all():
        raise ValueError(f"{archive.name}: {name} holds no usable rows under {EMBEDDING_KEY!r}: expected finite (k, width)")
    return rows.float()

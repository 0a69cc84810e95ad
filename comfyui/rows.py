"""Reading the learned rows of tokens, from an embedding in safetensors or from a weights archive, told apart by content."""

import json
import lzma
import zipfile
import zlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

KEY = "qwen25_7b"  # ComfyUI's name for the text encoder of Qwen-Image, and the key of its embeddings
FOLDER = "embeddings/"  # of an archive
SUFFIX = ".safetensors"
ZIP_MAGIC = b"PK\x03\x04"  # APPNOTE.TXT 4.3.7
MAX_BYTES = 8 * 1024**2  # of an embedding: 64 rows of 3584 numbers in fp32 have a tenth of that
MAX_ROWS = 64  # of a token
MAX_ENTRIES = 1000  # of an archive, which has two and one for each token
MAX_TOKENS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the standard library raises for archives that were cut, changed or encrypted.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeDecodeError, OSError)


def read_embeddings(path: Path, token: str = "") -> dict[str, Tensor]:
    """Rows (k, D) in fp32 by token, from an embedding file or from every embedding of a weights.zip.

    `token` is the word that stands for the rows, where it shall not be the one that the file names; of an archive with several
    tokens it chooses one. Raises ValueError, one sentence, for anything that is not such a file. Only safetensors and JSON are
    read, and no more of a file than MAX_BYTES.
    """
    if not path.is_file():
        raise ValueError(f"{path.name or path} is not a file: give an embedding in safetensors or a weights.zip")
    with path.open("rb") as file:
        found = _archive(path) if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC else [_file(path)]
    if len(found) == 1:
        named, rows = found[0]
        if not (token or named):
            raise ValueError(f"{path.name} does not say which token it holds: write it into the node's token")
        return {token or named: rows}
    embeddings = dict(found)
    if None in embeddings or len(embeddings) < len(found):
        raise ValueError(f"{path.name} holds embeddings without a token or two of the same: train it again")
    if token and token not in embeddings:
        raise ValueError(f"{path.name} holds {', '.join(sorted(embeddings))}, not {token}: give one of them, or none for all")
    return {token: embeddings[token]} if token else embeddings


def _file(path: Path) -> tuple[str | None, Tensor]:
    with path.open("rb") as file:
        return parse(path.name, file.read(MAX_BYTES + 1))


def _archive(path: Path) -> list[tuple[str | None, Tensor]]:
    """Every `embeddings/*.safetensors` of a zip, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ValueError(f"{path.name} holds {len(entries)} files: a weights archive has at most {MAX_ENTRIES}")
            chosen = sorted(
                (entry for entry in entries if _is_embedding(entry.filename)),
                key=lambda entry: entry.filename,
            )
            if len(chosen) > MAX_TOKENS:
                raise ValueError(f"{path.name} holds {len(chosen)} tokens: at most {MAX_TOKENS} are read")
            found = []
            for entry in chosen:
                with archive.open(entry) as file:  # bounded, since the size that the entry states need not be true
                    found.append(parse(f"{path.name}: {entry.filename}", file.read(MAX_BYTES + 1)))
    except DAMAGE as error:
        raise ValueError(f"{path.name} is a damaged or encrypted archive ({error}): download it again") from error
    if not found:
        raise ValueError(f"{path.name} holds no {FOLDER}*{SUFFIX}: it was trained without a token, load its LoRA alone")
    return found


def _is_embedding(name: str) -> bool:
    """Also with a folder on top, as of an archive that was packed again; macOS leaves dot files beside them then."""
    return f"/{FOLDER}" in f"/{name}" and name.endswith(SUFFIX) and not name.split("/")[-1].startswith(".")


def parse(name: str, content: bytes) -> tuple[str | None, Tensor]:
    """The token that the header of a safetensors file names, None where it names none, and the rows (k, D), fp32."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES} bytes: the embedding of a token is smaller")
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{name} is not a safetensors file: give an embedding as the training wrote it") from error
    rows = tensors.get(KEY)
    if rows is None:
        raise ValueError(f"{name} holds no tensor {KEY!r}: it is not an embedding for Qwen-Image")
    if rows.dtype not in DTYPES or rows.ndim != 2 or not 1 <= len(rows) <= MAX_ROWS or not torch.isfinite(rows).all():
        raise ValueError(f"{name} holds no usable rows: expected finite numbers (k, D) with k from 1 to {MAX_ROWS}")
    return (header.get("__metadata__") or {}).get("token"), rows.float()

"""The node: a prompt with placeholder tokens => conditioning, through ComfyUI's own Qwen-Image text encoder."""

import logging
from pathlib import Path
from typing import Any

import folder_paths

from .rows import SUFFIX, read_embeddings
from .splice import tokenize

NONE = "none"


class QwenImagePlaceholderToken:
    """Encodes a prompt in which a token, such as <zwx>, has learned rows; a prompt without a token as CLIP Text Encode does."""

    CATEGORY = "conditioning"
    DESCRIPTION = "Encodes a prompt for Qwen-Image, with the learned embedding of a token such as <zwx> in the token's place."
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:  # noqa: N802 (ComfyUI's name)
        """The node's inputs, as ComfyUI asks for them."""
        files = [name for name in folder_paths.get_filename_list("embeddings") if name.endswith(SUFFIX)]
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "From CLIPLoader with type qwen_image."}),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The prompt, with the token in it."}),
                "embedding": ([NONE, *files], {"tooltip": "A file of models/embeddings, from embeddings/ of weights.zip."}),
            },
            "optional": {
                "archive": (
                    "STRING",
                    {"default": "", "tooltip": "Instead: path of weights.zip; relative: in the input folder."},
                ),
                "token": ("STRING", {"default": "", "tooltip": "The word in the text; blank: the one that the file names."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, embedding: str | None, archive: str | None = "", **_: Any) -> str:  # noqa: N802 (ComfyUI's name)
        """What changes when the file does, so that ComfyUI encodes again; it gives None for an input that is a link."""
        path = chosen_file(embedding or NONE, archive or "")
        state = path.stat() if path and path.is_file() else None
        return f"{path} {state.st_mtime_ns} {state.st_size}" if state else str(path)

    def encode(self, clip: Any, text: str, embedding: str, archive: str = "", token: str = "") -> tuple[Any]:
        """The conditioning; ValueError says what is wrong with an input."""
        if clip is None:
            raise ValueError("there is no CLIP: connect CLIPLoader with type qwen_image")
        path = chosen_file(embedding, archive)
        embeddings = read_embeddings(path, token.strip()) if path else {}
        for word, rows in embeddings.items():
            logging.info("Qwen-Image placeholder token: %s has %d rows and stands %d times", word, len(rows), text.count(word))
        return (clip.encode_from_tokens_scheduled(tokenize(clip, text, embeddings)),)


def chosen_file(embedding: str, archive: str) -> Path | None:
    """The file that the inputs name, None where they name none; ValueError where they name two."""
    archive = archive.strip().strip('"')  # Windows copies paths in quotes
    if embedding != NONE and archive:
        raise ValueError(f"embedding {embedding} and archive {archive} are both given: choose one of them")
    if archive:
        return Path(folder_paths.get_input_directory()) / archive
    return None if embedding == NONE else Path(folder_paths.get_full_path_or_raise("embeddings", embedding))

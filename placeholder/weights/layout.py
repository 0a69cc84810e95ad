"""The names of the files in a weights archive."""

from urllib.parse import quote

META_NAME = "meta.json"
LORA_NAME = "lora/lora_weights.safetensors"
HUB_LORA_NAME = "lora_weights.safetensors"  # at the root of a repository, where load_lora_weights(repo_id) looks
EMBEDDINGS_FOLDER = "embeddings"


def embedding_name(token: str) -> str:
    """Where the rows of a token are stored: `<zwx>` in embeddings/zwx.safetensors; unusual characters are percent-encoded."""
    bare = token[1:-1] if len(token) > 2 and token.startswith("<") and token.endswith(">") else token
    return f"{EMBEDDINGS_FOLDER}/{quote(bare, safe='').replace('.', '%2E')}.safetensors"

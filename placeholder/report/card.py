"""The model card of a trained archive on the Hugging Face hub: front matter that the hub reads, then what a person needs."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from placeholder.weights.archive import embedding_name

BASE_LICENSE = "apache-2.0"  # of Qwen/Qwen-Image, from which the LoRA is derived
GRID, CURVE = "report/grid.jpg", "report/curve.png"
OPTIONS = ("steps", "rank", "learning_rate", "batch_size", "resolution", "optimizer", "seed", "images")
IMPORTS = ("import torch", "from diffusers import QwenImagePipeline", "from huggingface_hub import snapshot_download")
IMPORTS_FOR_TOKENS = ("from safetensors.torch import load_file", "from transformers import AddedToken")
LOADED = """\
folder = snapshot_download("{repo_id}")
pipe = QwenImagePipeline.from_pretrained("{base_model}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights(folder, weight_name="lora_weights.safetensors")"""
REGISTERED = """\
matrix = pipe.text_encoder.get_input_embeddings().weight  # has more rows than the tokenizer has entries: do not resize it
for token, token_id, file in {rows}:
    pipe.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    assert pipe.tokenizer.convert_tokens_to_ids(token) == token_id
    with torch.no_grad():
        matrix[token_id] = load_file(f"{{folder}}/{{file}}")["qwen25_7b"][0].to(matrix)"""
DRAWN = 'image = pipe({prompt!r}, negative_prompt=" ", true_cfg_scale=4.0).images[0]'
BEFORE_AND_AFTER = "Before and after the training; the prompts stand in the picture"
NOT_ON_HUB = "A LoRA for a base model with the classes of Qwen-Image that is not on the hub, so it may fit no other."


def model_card(meta: dict[str, Any], repo_id: str, pictures: list[str]) -> str:
    """The README.md of the repository, for what `meta.json` says and the names of the pictures beside it."""
    tokens = meta["placeholder_token_ids"]
    prompt = f"a photo of {next(iter(tokens))}" if tokens else meta["default_caption"]
    base_model = meta["base_model"]
    on_hub = bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model)) and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=BASE_LICENSE,
        instance_prompt=prompt,
        tags=["text-to-image", "diffusers", "lora", "qwen-image", "template:sd-lora"],
        widget=[{"text": BEFORE_AND_AFTER, "output": {"url": name}} for name in pictures if name == GRID],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id}",
        f"A LoRA for [{base_model}](https://huggingface.co/{base_model})." if on_hub else NOT_ON_HUB,
        _trigger(list(tokens)),
        *(f"![{text}]({name})" for name, text in ((GRID, BEFORE_AND_AFTER),) if name in pictures),
        *_usage(meta, repo_id, prompt, on_hub),
        "## Training",
        "| option | value |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(meta[name])} |" for name in OPTIONS),
        *(f"![{text}]({name})" for name, text in ((CURVE, "Loss over the steps"),) if name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _trigger(tokens: list[str]) -> str:
    if not tokens:
        return "Trigger: the words of the captions."
    return (
        f"Trigger: {', '.join(f'`{token}`' for token in tokens)}, new to the tokenizer; what was learned of it lies in `embeddings/`. "
        "The LoRA alone does not know it."
    )


def _usage(meta: dict[str, Any], repo_id: str, prompt: str, on_hub: bool) -> list[str]:
    """How to draw with it in diffusers, where it is known on which model and a dozen lines suffice."""
    tokens = meta["placeholder_token_ids"]
    if not on_hub or any(len(ids) > 1 for ids in tokens.values()):
        return []
    rows = [(token, ids[0], embedding_name(token)) for token, ids in tokens.items()]
    code = [
        "\n".join(IMPORTS + (IMPORTS_FOR_TOKENS if rows else ())),
        LOADED.format(repo_id=repo_id, base_model=meta["base_model"]),
        *([REGISTERED.format(rows=rows)] if rows else []),
        DRAWN.format(prompt=prompt),
    ]
    return ["## With diffusers", "```python\n" + "\n\n".join(code) + "\n```"]


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

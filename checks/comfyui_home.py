"""A ComfyUI of its own for checks/comfyui_check.py: a folder as a user has it, and the nodes that ComfyUI loads from there."""

import asyncio
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
NODE = "qwen-image-placeholder-token"
# ComfyUI imports these packages at its start, for sound and for other models; nothing here uses them, so stand-ins will do.
FOR_OTHER_MODELS = (
    "torchvision",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchaudio",
    "torchaudio.functional",
)


def start(comfyui: Path, home: Path) -> None:
    """Make ComfyUI importable, on the CPU, in fp32, with `home` as its folder of models, inputs and custom nodes."""
    sys.path[0] = str(comfyui)  # instead of tests/
    os.chdir(comfyui)
    sys.argv[1:] = ["--cpu", "--fp32-text-enc", "--fp32-unet", "--base-directory", str(home)]
    import comfy.options

    comfy.options.enable_args_parsing()
    for name in FOR_OTHER_MODELS:
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.__getattr__ = lambda attribute: MagicMock(name=attribute)
        sys.modules[name] = module


def install(reference: Path, home: Path) -> None:
    """Put the node's folder and the archives' files where a user puts them, and empty files where the models would be."""
    workflow = json.loads((ROOT / "comfyui" / "workflow.json").read_text())
    models = {"UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae"}
    for node in workflow.values():
        if folder := models.get(node["class_type"]):
            [name] = [value for key, value in node["inputs"].items() if key.endswith("_name")]
            link(home / "models" / folder / name, reference / "text_encoder.safetensors")
    link(home / "models" / "loras" / "lora_weights.safetensors", reference / "lora_weights.safetensors")
    link(home / "models" / "embeddings" / "zwx.safetensors", reference / "zwx.safetensors")
    link(home / "custom_nodes" / NODE, ROOT / "comfyui")
    for name in ("one.zip", "two.zip", "opposite.zip"):
        link(home / "input" / name, reference / name)


def link(path: Path, target: Path) -> None:
    """A link at `path` to `target`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target.resolve())


def load_nodes(home: Path) -> dict[str, type]:
    """ComfyUI's own nodes that the workflow uses, and ours, loaded by ComfyUI from its folder of custom nodes."""
    import nodes
    from comfy_config.config_parser import extract_node_configuration

    async def load() -> None:
        await nodes.init_external_custom_nodes()
        for name in ("nodes_sd3", "nodes_model_advanced", "nodes_hooks"):
            assert await nodes.load_custom_node(f"comfy_extras/{name}.py", module_parent="comfy_extras")

    asyncio.run(load())
    folder = home / "custom_nodes" / NODE
    assert extract_node_configuration(str(folder)).project.name == NODE, "ComfyUI does not read pyproject.toml"
    assert "QwenImagePlaceholderToken" in nodes.NODE_CLASS_MAPPINGS, "ComfyUI did not load the node's folder"
    assert not any(name.split(".")[0] in ("placeholder", "diffusers") for name in sys.modules), "the node does not stand alone"
    return nodes.NODE_CLASS_MAPPINGS

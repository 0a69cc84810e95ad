"""Holds the node of comfyui/ and the LoRA of an archive against ComfyUI itself, with what checks/comfyui_reference.py wrote.

    python checks/comfyui_check.py COMFYUI REFERENCE OUTPUT

COMFYUI is the folder of ComfyUI's sources, REFERENCE what comfyui_reference wrote, OUTPUT the file for the result. Runs in
ComfyUI's environment, where this package is not installed. ComfyUI's classes are used as they are, but with the sizes of the
tiny base model; the width of its attention heads, a constant in ComfyUI, is replaced.
"""

import asyncio
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from comfyui_home import ROOT, install, load_nodes, start
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5
A, B, PREFIX = ".lora_A.weight", ".lora_B.weight", "transformer."


def load_clip(facts: dict, reference: Path):
    """ComfyUI's CLIP of Qwen-Image with the weights of the tiny base model; the vision tower keeps its size and no weights."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.llama
    import comfy.text_encoders.qwen_image as qwen_image

    comfy.text_encoders.llama.Qwen25_7BVLI_Config.head_dim = facts["head_dim"]
    target = comfy.supported_models_base.ClipTarget(qwen_image.QwenImageTokenizer, qwen_image.te())
    weights = load_file(reference / "text_encoder.safetensors")
    clip = comfy.sd.CLIP(target, model_options={"qwen25_7b_model_config": facts["text_encoder"]})
    missing, unexpected = clip.load_sd(weights)
    assert not unexpected and all(key.startswith("visual.") for key in missing), (missing, unexpected)
    clip.tokenizer.qwen25_7b.embedding_size = facts["text_encoder"]["hidden_size"]
    return clip


def check_conditioning(facts: dict, reference: Path, node, clip) -> tuple[dict[str, float], float]:
    """Differences of the node's conditioning from the package's prompt embeddings, by prompt; the least with a negated row."""
    expected = load_file(reference / "conditioning.safetensors")
    differences, controls = {}, []
    for name, text in (facts["one"] | facts["two"]).items():
        archive = "one.zip" if name in facts["one"] else "two.zip"
        [[[conditioning, options]]] = node().encode(clip, text, "none", archive)
        assert conditioning.shape == expected[name].shape, (name, conditioning.shape, expected[name].shape)
        assert "attention_mask" not in options, f"{name}: ComfyUI masks tokens"
        differences[name] = difference(conditioning, expected[name])
        if archive == "one.zip":  # the same from the file in the embeddings folder
            [[[again, _]]] = node().encode(clip, text, "zwx.safetensors")
            assert torch.equal(again, conditioning), name
            [[[other, _]]] = node().encode(clip, text, "none", "opposite.zip")
            controls += [difference(other, expected[name])] if "<zwx>" in text else []
    [[[stock, _]]] = [clip.encode_from_tokens_scheduled(clip.tokenize(facts["one"]["without"]))]
    assert difference(stock, expected["without"]) <= TOLERANCE, "ComfyUI's own text encoding differs"
    return differences, min(controls)


def new_model(sizes: dict, device: str = "cpu"):
    """ComfyUI's Qwen-Image model of these sizes, without weights."""
    import comfy.supported_models

    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **sizes})
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, device=torch.device(device))


def hook_patches(patcher, node, name: str):
    """A hook of the LoRA file `name` as the workflow has it, with the model ready to be patched by it."""
    import comfy.hooks

    [hooks] = node().create_hook_model_only(name, 1.0)
    patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    return hooks


def check_lora(facts: dict, reference: Path, node) -> tuple[dict, dict]:
    """The LoRA as the workflow's hook applies it: the weights' change against B A, and the model's prediction against ours.

    Without the hook, as in the unconditional pass, the weights are the base model's again, bit for bit.
    """
    import comfy.model_patcher

    model, cpu = new_model(facts["transformer"]), torch.device("cpu")
    weights = load_file(reference / "transformer.safetensors")
    found = model.diffusion_model.load_state_dict(weights, strict=True)
    assert not found.missing_keys
    lora = load_file(reference / "lora_weights.safetensors")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    predictions = load_file(reference / "predictions.safetensors")
    differences = {"base": difference(predict(model, facts, reference, predictions), predictions["base"])}

    patcher.patch_model(device_to=cpu)
    hooks = hook_patches(patcher, node, "lora_weights.safetensors")
    patcher.patch_hooks(hooks)
    deltas = []
    for name, value in model.diffusion_model.state_dict().items():
        module = PREFIX + name.removesuffix(".weight")
        if module + A in lora:
            update = lora.pop(module + B).float() @ lora.pop(module + A).float()
            deltas.append(difference(value, weights[name] + update))
        else:
            assert torch.equal(value, weights[name]), f"{name} was changed"
    assert not lora, f"not applied: {sorted(lora)}"
    differences["lora"] = difference(predict(model, facts, reference, predictions), predictions["lora"])
    differences["lora from base"] = difference(predictions["lora"], predictions["base"])
    patcher.patch_hooks(None)
    for name, value in model.diffusion_model.state_dict().items():
        assert torch.equal(value, weights[name]), f"{name} stays changed without the hook"
    return {"layers": len(deltas), "largest_difference_of_a_weight": max(deltas)}, differences


@torch.no_grad()
def predict(model, facts: dict, reference: Path, predictions: dict[str, Tensor]) -> Tensor:
    """What ComfyUI's transformer predicts for the latents and the prompt of the reference."""
    context = load_file(reference / "conditioning.safetensors")["middle"]
    predicted = model.diffusion_model(predictions["latents"][:, :, None], torch.tensor([facts["sigma"]]), context)
    return predicted[:, :, 0]


def check_full_size(facts: dict) -> dict[str, int]:
    """Whether every key of a LoRA on Qwen-Image itself finds its weight in ComfyUI's model of that size, and fits it."""
    import comfy.lora

    model = new_model({"in_channels": 64, "num_layers": 60}, "meta")
    lora = {key: torch.empty(shape, device="meta") for key, shape in facts["full_size_lora"].items()}
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model, {}))
    state = model.state_dict()
    loaded = set()
    for name, adapter in patches.items():
        up, down = adapter.weights[:2]
        assert adapter.weights[2] is None, f"{name} has an alpha"
        assert (up.shape[0], down.shape[1]) == state[name].shape, f"{name} does not fit"
        loaded |= adapter.loaded_keys
    assert loaded == lora.keys(), f"not loaded: {sorted(lora.keys() - loaded)}"
    return {"keys": len(lora), "loaded": len(loaded), "layers": len(patches)}


def check_workflow() -> int:
    """The number of nodes of the workflow, once ComfyUI has found all of them, their inputs and their links valid."""
    import execution

    workflow = json.loads((ROOT / "comfyui" / "workflow.json").read_text())
    valid, error, _, errors = asyncio.run(execution.validate_prompt("check", workflow, None))
    assert valid and not errors, (error, errors)
    import nodes

    for number, node in workflow.items():
        inputs = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        known = {name for kind in inputs.values() for name in kind}
        assert node["inputs"].keys() <= known, f"node {number} has unknown inputs {node['inputs'].keys() - known}"
    return len(workflow)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((ours.float() - theirs.float()).abs().max())


def main(comfyui: Path, reference: Path, output: Path) -> None:
    """Run every check and write the result; AssertionError where one fails."""
    facts = json.loads((reference / "facts.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        install(reference, home)
        start(comfyui, home)
        mappings = load_nodes(home)
        clip = load_clip(facts, reference)
        prompts, turned = check_conditioning(facts, reference, mappings["QwenImagePlaceholderToken"], clip)
        lora, predictions = check_lora(facts, reference, mappings["CreateHookLoraModelOnly"])
        import comfyui_version

        result = {
            "comfyui": comfyui_version.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
            "tolerance": TOLERANCE,
            "largest_difference_of_conditioning": prompts,
            "smallest_with_the_row_turned_around": turned,
            "lora": lora,
            "lora_of_full_size": check_full_size(facts),
            "largest_difference_of_prediction": predictions,
            "nodes_of_the_workflow": check_workflow(),
        }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    effects = [turned, predictions.pop("lora from base")]
    largest = max([*prompts.values(), *predictions.values(), lora["largest_difference_of_a_weight"]])
    assert largest <= TOLERANCE, f"a difference of {largest} is above {TOLERANCE}"
    assert min(effects) >= 1000 * TOLERANCE, f"rows and LoRA change too little to be seen: {effects}"
    output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:4]))

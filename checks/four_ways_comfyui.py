"""Images from the demo's archive by ComfyUI's own code, from the files that checks/four_ways_ours.py wrote.

    python checks/four_ways_comfyui.py COMFYUI FOLDER

Runs in ComfyUI's environment, where this package is not installed. Text encoder, node, LoRA loader, transformer, sampler,
VAE and SaveImage are ComfyUI's, with the sizes of the small base model; constants of its classes are replaced: the width of
the text encoder's heads, the VAE's residual blocks a level, and the mean and deviation of the latents.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_check import hook_patches, load_clip, new_model
from comfyui_home import NODE, ROOT, link, load_nodes, start
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_vae(facts: dict, folder: Path):
    """ComfyUI's VAE with the weights of the small one."""
    import comfy.ldm.wan.vae
    import comfy.sd

    blocks, whole = facts["vae"]["num_res_blocks"], comfy.ldm.wan.vae.WanVAE
    weights = load_file(folder / "vae.safetensors")
    comfy.ldm.wan.vae.WanVAE = lambda **sizes: whole(**(sizes | {"num_res_blocks": blocks}))
    vae = comfy.sd.VAE(sd=weights)
    stored = vae.first_stage_model.state_dict()
    assert stored.keys() == weights.keys(), sorted(stored.keys() ^ weights.keys())
    return vae


def load_model(facts: dict, folder: Path):
    """ComfyUI's Qwen-Image with the weights of the small one, in the patcher that its loader puts around."""
    import comfy.model_patcher

    model, cpu = new_model(facts["transformer"]), torch.device("cpu")
    model.diffusion_model.load_state_dict(load_file(folder / "transformer.safetensors"), strict=True)
    for name in ("latents_mean", "latents_std"):
        setattr(model.latent_format, name, torch.tensor(facts["vae"][name]).view(1, -1, 1, 1, 1))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def deltas(patcher, node) -> dict[str, Tensor]:
    """What the LoRA's hook adds to each weight (out, in) that it is for; every other weight stays as it was."""
    hooked = patcher.clone()
    hooks = hook_patches(hooked, node, "lora_weights.safetensors")
    named = {name.removeprefix("diffusion_model.") for patches in hooked.hook_patches.values() for name in patches}
    before = {name: value.clone() for name, value in hooked.model.diffusion_model.state_dict().items()}
    hooked.patch_hooks(hooks)
    changes = {name: value - before[name] for name, value in hooked.model.diffusion_model.state_dict().items()}
    hooked.patch_hooks(None)
    assert not any(value.any() for name, value in changes.items() if name not in named), "other weights were changed"
    assert all(torch.equal(value, before[name]) for name, value in hooked.model.diffusion_model.state_dict().items())
    return {name.removesuffix(".weight"): changes[name] for name in named}


def with_diffusers_guidance(patcher):
    """The model with diffusers' guidance: the guided prediction scaled to the norm of the unguided one, over patches of 2x2."""

    def norm(prediction: Tensor) -> Tensor:
        """(1, 16, 1, H, W) => (1, 1, 1, H, W)."""
        squares = F.avg_pool2d(prediction.square().sum(dim=1), 2) * 4  # (1, 1, H / 2, W / 2)
        return F.interpolate(squares.sqrt(), scale_factor=2, mode="nearest")[:, None]

    def guide(inputs: dict[str, Any]) -> Tensor:
        guided = inputs["uncond"] + inputs["cond_scale"] * (inputs["cond"] - inputs["uncond"])
        return guided * (norm(inputs["cond"]) / norm(guided))

    guided = patcher.clone()
    guided.set_model_sampler_cfg_function(guide)
    return guided


class Generation:
    """ComfyUI's nodes with the models of the small base and the archive loaded."""

    def __init__(self, facts: dict, folder: Path, nodes: dict[str, type]):
        self.facts, self.folder, self.nodes, self.picture = facts, folder, nodes, facts["picture"]
        self.clip, self.vae = load_clip(facts, folder), load_vae(facts, folder)
        self.model = load_model(facts, folder)
        self.deltas = deltas(self.model, nodes["CreateHookLoraModelOnly"])
        [self.hooks] = nodes["CreateHookLoraModelOnly"]().create_hook_model_only("lora_weights.safetensors", 1.0)
        self.sigmas = load_file(folder / "predict.py" / "record.safetensors")["sigmas"]

    def encode(self, prompt: str) -> list:
        """Conditioning through our node."""
        return self.nodes["QwenImagePlaceholderToken"]().encode(self.clip, prompt, "none", "weights.zip")[0]

    def gated(self, conditioning: list) -> list:
        """The conditioning with the LoRA on it, as the workflow has it for a prompt that names the token."""
        return self.nodes["ConditioningSetProperties"]().set_properties(conditioning, 1.0, "default", hooks=self.hooks)[0]

    def empty(self) -> dict[str, Tensor]:
        """Latents of zeros, from ComfyUI's node."""
        return self.nodes["EmptySD3LatentImage"].execute(self.picture["width"], self.picture["height"], 1)[0]

    def as_workflow(self, prompt: list, negative: list) -> dict[str, Tensor]:
        """What comfyui/workflow.json does: the shift of this size, KSampler with euler and simple."""
        [model] = self.nodes["ModelSamplingAuraFlow"]().patch_aura(self.model, self.facts["shift"])
        seed, steps, guidance = (self.picture[name] for name in ("seed", "steps", "guidance"))
        return self.nodes["KSampler"]().sample(
            model, seed, steps, guidance, "euler", "simple", prompt, negative, self.empty(), 1.0
        )[0]

    def as_diffusers(self, prompt: list, negative: list) -> dict[str, Tensor]:
        """The same sampler with diffusers' sigmas and guidance."""
        import comfy.sample
        import comfy.samplers

        model, seed = with_diffusers_guidance(self.model), self.picture["seed"]
        latents = comfy.sample.fix_empty_latent_channels(model, self.empty()["samples"])
        noise, sampler = comfy.sample.prepare_noise(latents, seed), comfy.samplers.sampler_object("euler")
        guidance = self.picture["guidance"]
        return {
            "samples": comfy.sample.sample_custom(
                model, noise, guidance, sampler, self.sigmas, prompt, negative, latents, disable_pbar=True, seed=seed
            )
        }

    def generate_all(self, way: str, sample: Any, output: Path) -> None:
        """Every prompt in one way: FOLDER/way/N.png and record.safetensors."""
        (self.folder / way).mkdir(exist_ok=True)
        negative = self.encode("")
        tensors = {"negative": negative[0][0]} | {f"delta.{name}": value for name, value in self.deltas.items()}
        for number, prompt in enumerate(self.facts["prompts"]):
            positive = self.encode(prompt)
            latents = sample(self.gated(positive) if "<zwx>" in prompt else positive, negative)
            [images] = self.nodes["VAEDecode"]().decode(self.vae, latents)
            [saved] = self.nodes["SaveImage"]().save_images(images, way)["ui"]["images"]
            shutil.copy(output / saved["filename"], self.folder / way / f"{number}.png")
            tensors |= {f"prompt.{number}": positive[0][0], f"latents.{number}": latents["samples"]}
        save_file({name: value.contiguous() for name, value in tensors.items()}, self.folder / way / "record.safetensors")
        print(f"{way}: {number + 1} images", flush=True)


def main(comfyui: Path, folder: Path) -> None:
    """Generate images in ComfyUI, with its own guidance and schedule and with those of diffusers."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        link(home / "models" / "loras" / "lora_weights.safetensors", folder / "lora_weights.safetensors")
        link(home / "custom_nodes" / NODE, ROOT / "comfyui")
        link(home / "input" / "weights.zip", folder / "weights.zip")
        start(comfyui, home)
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)
        with torch.no_grad():
            generation = Generation(facts, folder, load_nodes(home))
            generation.generate_all("ComfyUI", generation.as_diffusers, home / "output")
            generation.generate_all("ComfyUI, workflow.json", generation.as_workflow, home / "output")
        import comfyui_version

        (folder / "comfyui.json").write_text(json.dumps(comfyui_version.__version__))


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))

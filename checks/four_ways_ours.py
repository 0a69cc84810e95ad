"""Images from the demo's archive in the three ways that run in this package's environment, and what ComfyUI needs for its own.

python -m checks.four_ways_ours ARCHIVE FOLDER
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from safetensors.torch import save_file
from torch import Tensor

from checks.comfyui_reference import sizes, write_models
from checks.comfyui_vae import vae_name
from demo.run import IMAGE, TOKEN
from demo.server import ROOT
from placeholder.model.base import MODEL_VARIABLE, BaseModel
from placeholder.model.loading import load_scheduler, load_text_encoder, load_transformer, load_vae
from placeholder.service import cli as command_line
from standin.small_base import build_small_base
from study.subjects import SUBJECTS
from tests.support.samples import read_zip

HOUSE = SUBJECTS["object"]
CONTEXTS = (*HOUSE.seen, *HOUSE.unseen)
BACKGROUNDS = tuple(context.background for context in CONTEXTS)
PROMPTS = [
    *(HOUSE.prompt(TOKEN, context) for context in CONTEXTS),
    HOUSE.prompt("", HOUSE.seen[0]),
    "a photo of a red circle on a blue background",
]
# What is replaced in the example of docs/predict.md: a smaller model and image, on the CPU. Each occurs there once.
EXAMPLE_STARTS, EXAMPLE_ENDS = "    import json\n    import zipfile\n", "    prompt, negative_prompt ="
SHIFT_CONSTANTS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
SETTINGS = '" "\n    settings = dict(true_cfg_scale=4.0, width=1024, height=1024, num_inference_steps=50)'

Generate = Callable[[str, Path], None]


@contextmanager
def recording() -> Iterator[dict[str, Any]]:
    """The inputs of a diffusers pipeline while it generates an image: embeddings, the last latents, and the pipeline itself.

    Any of the pipelines: ours, the stock one, and that of the command line. Nothing of what they compute is changed.
    """
    encode, decode, seen = QwenImagePipeline.encode_prompt, AutoencoderKLQwenImage.decode, {"embeds": []}

    def encode_prompt(pipeline: QwenImagePipeline, *args: Any, **options: Any) -> tuple:
        found = encode(pipeline, *args, **options)
        seen["embeds"].append(found[0].clone())
        seen["pipeline"] = pipeline
        return found

    def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor, *args: Any, **options: Any) -> Any:
        seen["latents"] = latents.clone()
        return decode(vae, latents, *args, **options)

    with (
        patch.object(QwenImagePipeline, "encode_prompt", encode_prompt),
        patch.object(AutoencoderKLQwenImage, "decode", decode_latents),
    ):
        yield seen


@torch.no_grad()
def deltas(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """What the LoRA adds to each weight (out, in): the layer's answer to unit vectors, less that of the layer beneath."""
    found = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(True)  # the last pass was the negative prompt's, without the LoRA
            for variant in module.lora_variant.values():
                variant.gate.acting = {}
            units = torch.eye(module.in_features)
            found[name] = (module(units) - module.base_layer(units)).T.contiguous()
    return found


def generate_all(way: str, folder: Path, generate: Generate) -> None:
    """An image of every prompt in one way: FOLDER/way/N.png, and what was recorded in record.safetensors."""
    (folder / way).mkdir()
    tensors = {}
    for number, prompt in enumerate(PROMPTS):
        with recording() as seen, redirect_stdout(None):
            generate(prompt, folder / way / f"{number}.png")
        tensors[f"prompt.{number}"], tensors["negative"] = seen["embeds"]
        tensors[f"latents.{number}"] = seen["latents"]
    tensors["sigmas"] = seen["pipeline"].scheduler.sigmas
    tensors |= {f"delta.{name}": value for name, value in deltas(seen["pipeline"].transformer).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / way / "record.safetensors")
    print(f"{way}: {len(PROMPTS)} images", flush=True)


def predictor(archive: Path | None) -> Generate:
    """predict.py:Predictor, with the archive of each request as Cog hands it over."""
    from predict import Predictor

    cog = Predictor()
    with redirect_stdout(None):
        cog.setup()

    def generate(prompt: str, path: Path) -> None:
        inputs = command_line.inputs_of("predict", IMAGE | {"prompt": prompt, "replicate_weights": str(archive or "")})
        path.write_bytes(Path(cog.predict(**inputs)).read_bytes())

    return generate


def documented_example(archive: Path, model: Path, unpacked: Path) -> Generate:
    """The example for stock diffusers of docs/predict.md, run as it is but for names, sizes and the device."""
    text = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    block = text[text.index(EXAMPLE_STARTS) : text.index(EXAMPLE_ENDS)]
    for old, new in (
        ('ZipFile("weights.zip")', f"ZipFile({str(archive)!r})"),
        ('extractall("weights")', f"extractall({str(unpacked)!r})"),
        ('load_lora_weights("weights/lora"', f"load_lora_weights({str(unpacked / 'lora')!r}"),
        ('f"weights/embeddings/', f'f"{unpacked}/embeddings/'),
        ('"Qwen/Qwen-Image", dtype=torch.bfloat16).to("cuda")', f"{str(model)!r}, dtype=torch.float32)"),
    ):
        assert block.count(old) == 1, f"the example in docs/predict.md has no {old} any more"
        block = block.replace(old, new)
    assert text.count(SETTINGS) == 1, "the example in docs/predict.md has other settings"
    names: dict[str, Any] = {}
    exec(compile("\n".join(line[4:] for line in block.splitlines()), "predict.md", "exec"), names)
    names["pipe"].set_progress_bar_config(disable=True)
    names["negative_prompt"] = " "
    settings = {
        "negative_prompt": names["negative_prompt"],
        "true_cfg_scale": IMAGE["guidance"],
        "num_inference_steps": IMAGE["steps"],
        **{name: IMAGE[name] for name in ("width", "height")},
    }

    def generate(prompt: str, path: Path) -> None:
        names["prompt"] = prompt
        names["pipe"](prompt, generator=torch.Generator().manual_seed(IMAGE["seed"]), **settings).images[0].save(path)

    return generate


def command(archive: Path) -> Generate:
    """`python -m placeholder predict` in its own process, and in this one, where it is recorded: both write the same file."""

    def generate(prompt: str, path: Path) -> None:
        given = {name: value for name, value in IMAGE.items() if name != "output_format"} | {"replicate_weights": archive}
        options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        arguments = ["predict", prompt, *options, "-o"]
        subprocess.run([sys.executable, "-m", "placeholder", *arguments, path], cwd=ROOT, check=True, capture_output=True)
        again = path.with_name("again.png")
        with redirect_stderr(io.StringIO()):
            assert command_line.main([*arguments, str(again)]) == 0
        assert again.read_bytes() == path.read_bytes(), f"two runs of the command made different images of {prompt}"
        again.unlink()

    return generate


def write_reference(archive: Path, model: Path, folder: Path) -> None:
    """What ComfyUI's side needs: weights, the archive's LoRA in a file of its own, and facts."""
    base = BaseModel(str(model), torch.device("cpu"), torch.float32)
    text_encoder, transformer = load_text_encoder(base), load_transformer(base)
    write_models(folder, text_encoder, transformer)
    vae = load_vae(base, base.dtype)
    resnets = vae.config.num_res_blocks + 1
    save_file({vae_name(name, resnets): value for name, value in vae.state_dict().items()}, folder / "vae.safetensors")
    shutil.copy(archive, folder / "weights.zip")
    (folder / "lora_weights.safetensors").write_bytes(read_zip(archive)["lora/lora_weights.safetensors"])
    schedule = load_scheduler(base).config
    tokens = IMAGE["width"] * IMAGE["height"] // 16**2
    facts = {
        **sizes(text_encoder, transformer),
        "vae": {name: vae.config[name] for name in ("num_res_blocks", "latents_mean", "latents_std")},
        "shift": math.exp(calculate_shift(tokens, *(schedule[name] for name in SHIFT_CONSTANTS))),
        "prompts": PROMPTS,
        "picture": IMAGE,
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def main(archive: Path, folder: Path) -> None:
    """Generate images in every way of this environment, into an empty `folder`."""
    if not archive.is_file():
        raise SystemExit(f"{archive.name} is not there: make demo makes it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build_small_base()
    os.environ[MODEL_VARIABLE] = str(model)
    write_reference(archive, model, folder)
    generate_all("base model", folder, predictor(None))
    generate_all("predict.py", folder, predictor(archive))
    with tempfile.TemporaryDirectory() as unpacked:
        generate_all("diffusers", folder, documented_example(archive, model, Path(unpacked)))
    generate_all("command line", folder, command(archive))


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))

"""LoRA files of other trainers: each at exactly its strength, and a sentence about everything else."""

import json
import subprocess
import sys
import time

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from demo.server import ROOT
from placeholder.lora.adapter import load_lora
from placeholder.lora.keys import BLOCK_LAYERS, DOTTED_BLOCK, DOTTED_TOP, TOP_LAYERS
from placeholder.model.loading import load_transformer
from placeholder.weights.archive import LORA_NAME, Weights, read_weights
from tests.lora.test_adapter import MODULES, random_lora, velocity
from tests.support.samples import write_tar, write_zip

RANK = 4
Layers = dict[str, tuple[Tensor, Tensor]]  # by the layer's name in diffusers: down (r, in) and up (out, r)


@pytest.fixture(scope="module")
def layers(base) -> Layers:
    """Random factors for every linear layer of the transformer."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, layer in load_transformer(base).named_modules():
        if isinstance(layer, nn.Linear):
            down, up = (
                torch.randn(RANK, layer.in_features, generator=generator),
                torch.randn(layer.out_features, RANK, generator=generator),
            )
            found[name] = (0.1 * down, 0.1 * up)
    return found


def file_of(
    layers: Layers, prefix: str, down: str, up: str, alpha: Tensor | None = None, flat: bool = False, header=None
) -> bytes:
    """A safetensors file with the keys `<prefix><layer><down>`, `<prefix><layer><up>`, and `<prefix><layer>.alpha` if given."""
    tensors = {}
    for layer, factors in layers.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        tensors |= {name + down: factors[0], name + up: factors[1]}
        if alpha is not None:
            tensors[name + ".alpha"] = alpha.clone()
    return save(tensors, header)


PEFT = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
METADATA = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 6})}

DOTTED = (".lora.down.weight", ".lora.up.weight")
UNPREFIXED = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 6})}


LAYER = "transformer_blocks.0.attn.to_q"
FLAT = "lora_unet_transformer_blocks_0_attn_to_q"
DOWN, UP = torch.ones(RANK, 64), torch.ones(64, RANK)
PAIR = {f"diffusion_model.{LAYER}{PEFT[0]}": DOWN, f"diffusion_model.{LAYER}{PEFT[1]}": UP}
FLAT_PAIR = {FLAT + KOHYA[0]: DOWN, FLAT + KOHYA[1]: UP}


@pytest.fixture
def read(tmp_path):
    """Reads a LoRA alone, of these tensors, with a PEFT configuration and more in its header."""

    def lora(tensors: dict[str, Tensor], configuration: object = None, **header: str) -> Weights:
        header |= {} if configuration is None else {"lora_adapter_metadata": json.dumps(configuration)}
        (tmp_path / "lora.safetensors").write_bytes(
            save({key: value.clone() for key, value in tensors.items()}, header or None)
        )
        return read_weights(tmp_path / "lora.safetensors")

    return lora


def with_zero_biases(content: bytes) -> bytes:
    """The file with a bias of zeros for each lora_B."""
    tensors = load(content)
    biases = {key.replace(".weight", ".bias"): torch.zeros(len(up)) for key, up in tensors.items() if "lora_B" in key}
    return save(tensors | biases)


FORMATS = {  # the file, and alpha / rank as its trainer means it
    "diffusers": (lambda some: file_of(some, "transformer.", *PEFT, header=METADATA), 1.5),
    "flymyai": (lambda some: file_of(some, "transformer.", *PEFT), 1.0),
    "ai-toolkit": (lambda some: file_of(some, "diffusion_model.", *PEFT), 1.0),
    "ai-toolkit, alpha": (lambda some: file_of(some, "diffusion_model.", *PEFT, torch.tensor(8.0)), 2.0),
    "musubi-tuner": (lambda some: file_of(some, "lora_unet_", *KOHYA, torch.tensor(1.0), flat=True), 0.25),
    "musubi-tuner, converted": (lambda some: file_of(some, "lora_unet_", *KOHYA, torch.tensor(RANK), flat=True), 1.0),
    "DiffSynth": (lambda some: file_of(some, "", *NAMED), 1.0),
    "DiffSynth, pipe.dit": (lambda some: file_of(some, "pipe.dit.", *NAMED), 1.0),
    "bare": (lambda some: file_of(some, "", *PEFT), 1.0),
    "bare, alpha": (lambda some: file_of(some, "", *PEFT, torch.tensor([2.0])), 0.5),
    "ComfyUI": (lambda some: file_of(some, "diffusion_model.", *KOHYA, torch.tensor(12.0).bfloat16()), 3.0),
    "kohya": (lambda some: file_of(some, "transformer.", *KOHYA, torch.tensor(6.0).half()), 1.5),
    "SimpleTuner": (lambda some: file_of(some, "transformer.", *DOTTED), 1.0),
    "SimpleTuner, ComfyUI": (lambda some: file_of(some, "diffusion_model.", *PEFT, torch.tensor(6.0), header=UNPREFIXED), 1.5),
    "PEFT": (lambda some: file_of(some, "base_model.model.", *PEFT), 1.0),
    "LyCORIS": (lambda some: file_of(some, "lycoris_", *KOHYA, torch.tensor(2.0), flat=True), 0.5),
    "OneTrainer, flat": (lambda some: file_of(some, "lora_transformer_", *KOHYA, torch.tensor(1.0), flat=True), 0.25),
    "bare, kohya": (lambda some: file_of(some, "", *KOHYA, torch.tensor(2.0)), 0.5),
    "zero biases": (lambda some: with_zero_biases(file_of(some, "transformer.", *PEFT)), 1.0),
    "kohya without alpha": (lambda some: file_of(some, "transformer.", *KOHYA), 1.0),
}


# What stock diffusers reads too, and reads as its trainer means it.
STOCK = (
    "flymyai",
    "SimpleTuner",
    "ai-toolkit",
    "ai-toolkit, alpha",
    "musubi-tuner",
    "musubi-tuner, converted",
    "bare, alpha",
    "ComfyUI",
)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_has_the_strength_of_its_format_and_that_of_stock_diffusers(kind, base, layers, tmp_path):
    written, scale = FORMATS[kind]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(written(layers))
    loaded, merged, halved = (load_transformer(base) for _ in range(3))
    load_lora(loaded, read_weights(path).lora)
    with torch.no_grad():
        for name, (down, up) in layers.items():
            merged.get_submodule(name).weight += scale * up @ down
            halved.get_submodule(name).weight += scale / 2 * up @ down
    found, expected = velocity(loaded), velocity(merged)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for other in (velocity(halved), velocity(load_transformer(base))):
        assert (found - other).abs().max() > 0.05
    if kind in STOCK:
        transformer = load_transformer(base)
        stock = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
        stock.load_lora_weights(tmp_path, weight_name=path.name)
        torch.testing.assert_close(found, velocity(transformer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 8},
        {"lora_alpha": 1.0},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 16, "to_k": 2}},
        {"lora_alpha": 4, "alpha_pattern": {"^transformer_blocks.0.attn.to_v": 12}},
        {"lora_alpha": 4, "alpha_pattern": {r"transformer_blocks\.0\.attn\.to_q": 16, "o_v": 2, "^to_k": 2}},
        {"lora_alpha": 4, "alpha_pattern": {"attn.to_k": 12, "to_k": 2}},
        {"lora_alpha": 4, "alpha_pattern": {r"attn\.to_k": 12, "attn.to_k": 2}},
    ],
)
def test_alphas_in_the_metadata_count_as_in_stock_diffusers(settings, base, tmp_path):
    state, transformer = random_lora(), load_transformer(base)
    metadata = {"r": 4, "target_modules": MODULES, **settings}
    header = {f"transformer.{name}": value for name, value in metadata.items()}
    file = tmp_path / "lora.safetensors"
    save_file(
        {f"transformer.{key}": value for key, value in state.items()}, file, {"lora_adapter_metadata": json.dumps(header)}
    )
    stock = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=load_transformer(base))
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    plain = velocity(transformer)
    load_lora(transformer, read_weights(file).lora)
    torch.testing.assert_close(velocity(transformer), velocity(stock.transformer), rtol=1e-4, atol=1e-5)
    assert (velocity(transformer) - plain).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_8_bit_floats_are_read_exactly(dtype, read):
    down, up = (torch.linspace(-2, 2, 256).reshape(shape).to(dtype) for shape in ((4, 64), (64, 4)))
    found = read({LAYER + PEFT[0]: down, LAYER + PEFT[1]: up}).lora
    assert torch.equal(found[LAYER + PEFT[0]].float(), down.float()) and torch.equal(found[LAYER + PEFT[1]].float(), up.float())


def test_pefts_configuration_beside_its_file_gives_the_strength(layers, tmp_path):
    content = file_of(layers, "base_model.model.", *PEFT)
    config = json.dumps({"r": RANK, "lora_alpha": 12, "peft_type": "LORA"}).encode()
    entries = {"out/adapter_model.safetensors": content, "out/adapter_config.json": config}
    found = read_weights(write_zip(tmp_path / "out.zip", entries)).lora
    for name, (down, up) in layers.items():
        torch.testing.assert_close(found[name + PEFT[1]] @ found[name + PEFT[0]], 3 * up @ down)


def test_a_pattern_for_every_layer_is_read_at_once(read):
    """A configuration may name each of 840 layers."""
    modules = [f"transformer_blocks.{block}.{layer}" for block in range(60) for layer in BLOCK_LAYERS]
    header = {"lora_alpha": 4, "alpha_pattern": {module.replace(".", r"\."): 8 for module in modules}}
    tensors = {module + end: value for module in modules for end, value in zip(PEFT, (DOWN, UP), strict=True)}
    start = time.monotonic()
    found = read(tensors, header).lora
    assert time.monotonic() - start < 5
    assert all(torch.equal(found[module + PEFT[1]], 8 / RANK * UP) for module in modules)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": RANK},
        {"r": RANK, "alpha_pattern": {"to_q": 16}},
        {"r": RANK, "lora_alpha": 12},
        {"lora_alpha": 12, "use_rslora": True},
    ],
)
def test_a_configuration_counts_as_in_peft_also_where_it_names_no_alpha(settings, read):
    config = LoraConfig(**settings)
    alpha = config.alpha_pattern.get("to_q", config.lora_alpha)
    scale = alpha / (RANK**0.5 if config.use_rslora else RANK)
    torch.testing.assert_close(read(PAIR, settings).lora[LAYER + PEFT[1]], scale * UP)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_pefts_configuration_is_read_in_the_encodings_of_json(encoding, tmp_path):
    content = save(PAIR)
    config = json.dumps({"r": RANK, "lora_alpha": 12}).encode(encoding)
    path = write_zip(tmp_path / "out.zip", {"adapter_model.safetensors": content, "adapter_config.json": config})
    torch.testing.assert_close(read_weights(path).lora[LAYER + PEFT[1]], 12 / RANK * UP)
    path = write_zip(
        tmp_path / "large.zip", {"adapter_model.safetensors": content, "adapter_config.json": b" " * 2**21 + config}
    )
    with pytest.raises(ValueError, match="adapter_config.json is .* bytes"):
        read_weights(path)
    path = write_zip(tmp_path / "bad.zip", {"adapter_model.safetensors": content, "adapter_config.json": b"{"})
    with pytest.raises(ValueError, match=r"^adapter_config\.json cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("stored", [torch.tensor(10.1).bfloat16(), torch.tensor(8.0).to(torch.float8_e4m3fn)])
def test_an_alpha_that_is_rounded_agrees_with_the_configuration(stored, read):
    alpha = 10.1 if stored.dtype == torch.bfloat16 else 8.0
    found = read(FLAT_PAIR | {FLAT + ".alpha": stored}, {"lora_alpha": alpha}).lora
    torch.testing.assert_close(found[LAYER + PEFT[1]], alpha / RANK * UP)


@pytest.mark.parametrize("page", [b"<!-- saved -->\n<html>", b"<title>404</title>", "<!doctype html>".encode("utf-16")])
def test_a_web_page_inside_an_archive_is_called_that(page, tmp_path):
    with pytest.raises(ValueError, match="is a web page, not the file"):
        read_weights(write_zip(tmp_path / "out.zip", {"a/lora.safetensors": page, "a/README.md": b""}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_costs_a_lora_of_16_bits_no_precision(dtype, read):
    """A tenth of what fp16 can just hold, and a scale that bf16 would round."""
    down, up = torch.full((3, 64), 1.0).to(dtype), torch.full((64, 3), 6.2e-5).to(dtype)
    lora = read({FLAT + KOHYA[0]: down, FLAT + KOHYA[1]: up, FLAT + ".alpha": torch.tensor(0.3)}).lora
    found = lora[LAYER + PEFT[1]] @ lora[LAYER + PEFT[0]].float()
    torch.testing.assert_close(found, 0.1 * up.float() @ down.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", ["", "./"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_the_only_lora_at_the_root_of_an_archive_is_read(write, start, layers, tmp_path):
    name = "pytorch_lora_weights.safetensors"
    content = FORMATS["ai-toolkit, alpha"][0](layers)
    clutter = {"settings.txt": b"steps: 100", "config.yaml": b"job: extension", "__MACOSX/._" + name: b"\0\5\26\7"}
    archive = write(tmp_path / "trained.bin", {start + other: text for other, text in ({name: content} | clutter).items()})
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(content)
    found, expected = read_weights(archive), read_weights(alone)
    assert found.lora.keys() == expected.lora.keys() and not found.embeddings and not found.meta
    assert all(torch.equal(found.lora[key], value) for key, value in expected.lora.items())


def test_our_own_archive_may_hold_any_of_the_formats(layers, tmp_path):
    entries = {LORA_NAME: FORMATS["musubi-tuner"][0](layers), "meta.json": b"{}"}
    found = read_weights(write_zip(tmp_path / "weights.zip", entries)).lora
    for name, (down, up) in layers.items():
        torch.testing.assert_close(found[name + PEFT[1]] @ found[name + PEFT[0]], up @ down / 4)


def test_the_layers_that_are_known_are_those_of_the_transformer():
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=2)
    linear = {name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    assert {*TOP_LAYERS, *(f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in BLOCK_LAYERS)} == linear
    assert len(DOTTED_TOP) == len(TOP_LAYERS) and len(DOTTED_BLOCK) == len(BLOCK_LAYERS)  # no two are the same with underscores
    assert not any(name.startswith("transformer_blocks_") for name in DOTTED_TOP)


ONE = torch.tensor(1.0)
MIXES = "lora.safetensors mixes two formats"
ONLY_PLAIN = "only plain LoRA can be loaded"
TEXT_ENCODER = "changes the text encoder .* only a LoRA of the transformer alone can be loaded"

WRONG = {
    "empty": ({}, "lora.safetensors holds no weights"),
    "another key": (PAIR | {"x.bias": ONE}, "holds 'x.bias', which is no weight of a LoRA: expected names that end in"),
    "a base model": ({f"{LAYER}.weight": torch.ones(64, 64)}, "holds 'transformer_blocks.0.*, which is no weight of a LoRA"),
    "two prefixes": (PAIR | {f"transformer.{LAYER}{PEFT[0]}": DOWN}, f"{MIXES}, 'diffusion_model.*' and 'transformer.*': save"),
    "a prefix and none": (PAIR | {f"transformer_blocks.1.attn.to_k{PEFT[0]}": DOWN}, MIXES),
    "two conventions": (PAIR | {f"diffusion_model.{LAYER}{KOHYA[0]}": DOWN}, MIXES),
    "an alpha alone": ({FLAT + ".alpha": ONE}, f"an alpha for '{LAYER}' without both of its weights: it is incomplete"),
    "an alpha without lora_B": ({FLAT + ".alpha": ONE, FLAT + KOHYA[0]: DOWN}, "without both of its weights"),
    "an alpha of two numbers": (
        FLAT_PAIR | {FLAT + ".alpha": torch.ones(2)},
        rf"'{FLAT}.alpha' of shape \(2,\) in torch.float32",
    ),
    "an alpha of NaN": (FLAT_PAIR | {FLAT + ".alpha": ONE * float("nan")}, "of nan: expected a number above 0"),
    "an alpha of zero": (FLAT_PAIR | {FLAT + ".alpha": ONE * 0}, "of 0.0: expected a number above 0"),
    "a negative alpha": (FLAT_PAIR | {FLAT + ".alpha": -ONE}, "of -1.0: expected a number above 0"),
    "an alpha that is no number": (FLAT_PAIR | {FLAT + ".alpha": torch.tensor(True)}, "in torch.bool: expected one number"),
    "LoKr": ({FLAT + ".lokr_w1": DOWN, FLAT + ".lokr_w2": UP, FLAT + ".alpha": ONE}, f"is of the kind LoKr .*: {ONLY_PLAIN}"),
    "LoHa": ({FLAT + ".hada_w1_a": DOWN, FLAT + ".alpha": ONE}, f"is of the kind LoHa .*: {ONLY_PLAIN}"),
    "DoRA": (FLAT_PAIR | {FLAT + ".dora_scale": torch.ones(64, 1)}, f"of the kind DoRA .*{ONLY_PLAIN}"),
    "DoRA of PEFT": (
        PAIR | {f"diffusion_model.{LAYER}.lora_magnitude_vector": torch.ones(64)},
        f"of the kind DoRA .*{ONLY_PLAIN}",
    ),
    "Tucker": (FLAT_PAIR | {FLAT + ".lora_mid.weight": DOWN}, f"is of the kind LoRA with a Tucker core .*: {ONLY_PLAIN}"),
    "LoKr in fp16": (
        {FLAT + ".lokr_w1": DOWN, FLAT + ".alpha": torch.tensor(float("inf")).half()},
        f"is of the kind LoKr .*: {ONLY_PLAIN}",
    ),
    "OFT": ({FLAT + ".oft_blocks": DOWN, FLAT + ".alpha": ONE}, f"is of the kind OFT .*: {ONLY_PLAIN}"),
    "full difference": ({f"diffusion_model.{LAYER}.diff": UP}, f"is of the kind full-rank difference .*: {ONLY_PLAIN}"),
    "biases": (PAIR | {f"diffusion_model.{LAYER}.diff_b": torch.ones(64)}, f"changes biases .*: {ONLY_PLAIN}"),
    "GLoRA": ({f"diffusion_model.{LAYER}.a1.weight": UP}, f"is of the kind GLoRA .*: {ONLY_PLAIN}"),
    "unknown prefix": ({f"unet.{LAYER}{PEFT[0]}": DOWN}, f"has an unknown prefix 'unet.' before '{LAYER}': known are"),
    "text encoder": (FLAT_PAIR | {"lora_te_model_layers_0_mlp_up_proj" + KOHYA[0]: DOWN}, TEXT_ENCODER),
    "another model": (
        {"lora_unet_double_blocks_0_img_attn_qkv" + KOHYA[0]: DOWN},
        "does not have, 'double_blocks_0_img_attn_qkv'",
    ),
    "no layer at all": ({"lora_unet_" + KOHYA[0]: DOWN}, "does not have, ''"),
    "no effect": (
        {FLAT + KOHYA[0]: DOWN, FLAT + KOHYA[1]: UP * 0},
        "changes nothing: there is no .lora_B.weight in it that is not",
    ),
    "no effect of lora_A": ({FLAT + KOHYA[0]: DOWN * 0, FLAT + KOHYA[1]: UP}, "changes nothing: there is no .lora_A.weight"),
    "three dimensions": ({FLAT + KOHYA[0]: DOWN[None], FLAT + KOHYA[1]: UP}, "of shape .* expected two dimensions"),
    "no dimensions": (FLAT_PAIR | {FLAT + KOHYA[0]: ONE, FLAT + ".alpha": ONE}, "of shape .* expected two dimensions"),
    "no rank": ({FLAT + KOHYA[0]: DOWN[:0], FLAT + KOHYA[1]: UP[:, :0], FLAT + ".alpha": ONE}, "expected two dimensions"),
    "64-bit floats": ({FLAT + KOHYA[0]: DOWN.double(), FLAT + KOHYA[1]: UP}, "in torch.float64: save it in float32, bfloat16"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_could_not_be_applied_exactly_gets_its_sentence(kind, read):
    tensors, sentence = WRONG[kind]
    with pytest.raises(ValueError, match=sentence):
        read(tensors)


# PEFT's patterns are regular expressions; some of these would keep the matching busy for ever.
PATTERNS = ["(", "", "to_q|to_k", ".*to_q", r"attn\.\w", r"(.|\w)" * 32 + "~", "(a+)+$", "to_q\n"]
UNREADABLE = "lora.safetensors has lora_adapter_metadata that cannot be read: "
SETTINGS = [
    ({"lora_alpha": 6}, "gives its strength twice, differently, as alpha keys and in its PEFT configuration: save"),
    ({"use_dora": True}, "the LoRA was trained with use_dora: only plain LoRA can be loaded"),
    ({"modules_to_save": ["proj_out"]}, "the LoRA was trained with modules_to_save: only plain LoRA can be loaded"),
    *(({"lora_alpha": alpha}, f"{UNREADABLE}lora_alpha") for alpha in (0, -1, None, "8")),
    *(({"lora_alpha": 8, "alpha_pattern": patterns}, UNREADABLE) for patterns in ({"to_q": "8"}, ["to_q"])),
    *(
        ({"lora_alpha": 4, "alpha_pattern": {name: 2}}, "holds '.*' in alpha_pattern: write the layers' names")
        for name in PATTERNS
    ),
    *(
        ({"lora_alpha": 1, "init_lora_weights": init}, f"init_lora_weights {init}, which changes the base model")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_a_configuration_that_cannot_be_applied_exactly_gets_its_sentence(settings, sentence, read):
    with pytest.raises(ValueError, match=sentence):
        read(FLAT_PAIR | {FLAT + ".alpha": ONE}, {f"transformer.{name}": value for name, value in settings.items()})
    with pytest.raises(ValueError, match=UNREADABLE):
        read(FLAT_PAIR, "text")


@pytest.mark.parametrize(
    ("header", "tokens"),
    [
        ({"placeholder_tokens": '["zwx"]', "modelspec.trigger_phrase": "zwx"}, ("zwx",)),
        ({"placeholder_tokens": "{"}, ()),
        ({"placeholder_tokens": '{"zwx": 1}'}, ()),
        ({"modelspec.trigger_phrase": "<sks>"}, ()),  # of another trainer
    ],
)
def test_the_tokens_of_a_lora_alone_come_from_its_header(header, tokens, read):
    assert read(FLAT_PAIR, **header).missing_tokens == tokens


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"notes.txt": b""}, "expected lora/lora_weights.safetensors, or one LoRA in safetensors, found no safetensors file"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "found 'a.safetensors'; 'b.safetensors': give the one that is wanted"),
        ({"lora.safetensors": b"", "old/lora.safetensors": b""}, "found 'lora.safetensors'; 'old/lora.safetensors'"),
        ({"lora.safetensors": b"", "embeddings/zwx.safetensors": b""}, "LoRA weights not found in w.zip: expected"),
        ({"lora.safetensors": b"", "meta.json": b"{}"}, "LoRA weights not found in w.zip: expected lora/lora_weights"),
        ({LORA_NAME: b""}, "meta.json not found in w.zip: give the archive as the training returned it"),
        ({"lora.safetensors": b"junk", "x.txt": b""}, "w.zip: lora.safetensors is not a safetensors file"),
        ({"lora.safetensors": save({}), "x.txt": b""}, "w.zip: lora.safetensors holds no weights"),
        ({"lora.safetensors": save({FLAT + KOHYA[0]: DOWN * 0}), "x.txt": b""}, "w.zip: lora.safetensors changes nothing"),
        (
            {"lora.safetensors": save({FLAT + KOHYA[0]: DOWN}), "x.txt": b""},
            "has no .lora_B.weight: it is incomplete, or a full",
        ),
    ],
)
def test_an_archive_that_is_not_clearly_one_lora_gets_its_sentence(entries, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        read_weights(write_zip(tmp_path / "w.zip", entries))


@pytest.mark.parametrize("tool", ["diffsynth", "musubi"])
def test_the_lines_that_convert_our_lora_for_other_tools_make_the_same_lora(tool, zero_prior, tmp_path):
    (tmp_path / "lora_weights.safetensors").write_bytes(zero_prior.entry(LORA_NAME))
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if f"'{tool}.safetensors'" in line)
    code = line.strip().removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = read_weights(tmp_path / f"{tool}.safetensors").lora
    expected = read_weights(zero_prior.archive).lora
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    keys = load((tmp_path / f"{tool}.safetensors").read_bytes())
    start = {"diffsynth": "transformer_blocks.", "musubi": "lora_unet_transformer_blocks_"}[tool]
    assert all(key.startswith(start) for key in keys)

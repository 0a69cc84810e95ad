"""Weights archives for the tiny base model, changed at random within their safetensors files and their meta.json."""

import json
import random

import torch
from safetensors.torch import load, save

from checks.mutations import Entries, changed_bytes, changed_entries, packed

VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    float("inf"),
    10**400,
    "",
    "text",
    "\0",
    "\ud800",
    "<zwx>",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
]
VALUES += [[None], [-1], [2**70], ["1"], [151665], [151666], [[151665]], "8", float("nan"), 1e300, "a\nb", {"<zwx>": [151665]}]
TOKENS = [
    "zwx",
    ".*",
    "(",
    "<|im_end|>",
    "TOK",
    "a b",
    "\0",
    "\ud800",
    "",
    "x" * 5000,
    "<ZWX>",
    "<zwx>x",
    "<../x>",
    "\u202e",
    "<a.b>",
]


PREFIXES = ["transformer.", "diffusion_model.", "pipe.dit.", "lora_unet_", "", "lora_te_"]
PARTS = [("lora_A", "lora_B"), ("lora_A.default", "lora_B.default"), ("lora_down", "lora_up"), ("lokr_w1", "lokr_w2")]


def mutated_weights(valid: Entries, seed: int) -> bytes:
    """A weights archive, or a bare LoRA, in which something is different."""
    rng = random.Random(f"weights {seed}")
    if rng.random() < 0.3:
        valid = _of_another_trainer(valid, rng)
    entries = [(name, _changed_weights_file(name, content, rng) if rng.random() < 0.25 else content) for name, content in valid]
    if rng.random() < 0.1:
        content = entries[[name.startswith("lora") for name, _ in entries].index(True)][1]
    else:
        content = packed(changed_entries(entries, rng) if rng.random() < 0.3 else entries, rng)
    return changed_bytes(content, rng) if rng.random() < 0.15 else content


def _of_another_trainer(valid: Entries, rng: random.Random) -> Entries:
    """The archive with its LoRA in (nearly) one of the formats of docs/formats.md, or as the hosted model packs it."""
    prefix, (down, up) = rng.choice(PREFIXES), rng.choice(PARTS)
    content = dict(valid)["lora/lora_weights.safetensors"]
    tensors = {}
    for key, value in load(content).items():
        module, part = key.removeprefix("transformer.").split(".lora_")
        name = prefix + (module.replace(".", "_") if prefix.startswith("lora_") else module)
        tensors[f"{name}.{down if part.startswith('A') else up}.weight"] = value
        if prefix in ("lora_unet_", "diffusion_model."):
            tensors[f"{name}.alpha"] = torch.tensor(rng.choice([1.0, 2.0, 0.5]))
    if rng.random() < 0.5:
        return [("lora.safetensors", save(tensors)), ("config.yaml", b"job: extension"), ("settings.txt", b"")]
    return [(name, save(tensors) if name.startswith("lora/") else other) for name, other in valid]


def _changed_weights_file(name: str, content: bytes, rng: random.Random) -> bytes:
    if not name.endswith((".safetensors", ".json")):
        return content[:1]
    if name == "meta.json":
        return _changed_meta(json.loads(content), rng)
    return rng.choice([_changed_header, _changed_tensor])(content, rng)


def _changed_meta(meta: dict, rng: random.Random) -> bytes:
    key = rng.choice(["placeholder_token_ids", "base_model", rng.choice(sorted(meta))])
    meta[key] = rng.choice(VALUES)
    if key == "placeholder_token_ids" and rng.random() < 0.7:
        meta[key] = {
            rng.choice(["<zwx>", *TOKENS]): rng.choice([[151665], rng.choice(VALUES)]) for _ in range(rng.choice([1, 1, 2, 70]))
        }
    whole = rng.random()
    text = json.dumps(meta if whole < 0.9 else rng.choice(VALUES))
    return (
        text.encode()
        if whole < 0.95
        else rng.choice([b"[" * 100_000, text.encode("utf-16"), text.encode() + bytes(1_100_000), b'{"a":' * 5000])
    )


def _changed_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with an edit in the JSON of its header."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    key = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.randrange(7)
    if kind == 0:
        header[key]["shape"] = rng.choice(
            [[], [0], [0, 2**62], [2**63], [0] * 100, header[key]["shape"][::-1], [-1, 1], ["4"], None, [4.0], [2**62] * 4]
        )
    elif kind == 1:
        header[key]["dtype"] = rng.choice(["F64", "F16", "I32", "U8", "F8_E4M3", "F4", "C64", "BOOL", "x", None, 5])
    elif kind == 2:
        header[key]["data_offsets"] = rng.choice(
            [[0, 0], [0, 2**62], [4, 0], [-1, 4], [0, len(data)], [0, 4, 8], None, ["0", "4"]]
        )
    elif kind == 3:
        new = rng.choice(
            ["x", "", "\0", key + "x", key.replace("to_q", "to_k"), key.replace("lora_A", "lora_B"), key[12:], "x" * 5000]
        )
        header[new] = header.pop(key)
    elif kind == 4:
        settings = {
            f"transformer.{name}": rng.choice(VALUES)
            for name in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
            if rng.random() < 0.5
        }
        header["__metadata__"] = {"lora_adapter_metadata": rng.choice([json.dumps(settings), "[" * 50_000, "x"])}
    elif kind == 5:
        header["__metadata__"] = rng.choice([None, [], 5, {"a": 1}, {"token": "<other>"}, {"token": "a\nb"}, {"format": "tf"}])
    else:
        header[key] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) - 1, len(text) + 5, 2**31, 2**40, 2**63])
    return length.to_bytes(8, "little") + text + data


def _changed_tensor(content: bytes, rng: random.Random) -> bytes:
    tensors = load(content)
    key = rng.choice(sorted(tensors))
    value = tensors[key].clone()
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38])
    other = torch.zeros(rng.choice([1, 2, 5]), rng.choice([1, 3, 64]))
    dtype = rng.choice(
        [torch.float16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint16]
    )
    tensors[key] = rng.choice(
        [
            value,
            tensors[key].T.contiguous() if tensors[key].ndim == 2 else tensors[key].reshape(1, 1),
            tensors[key][None],
            other,
            tensors[key].to(dtype),
            torch.zeros(3000, other.shape[1]),
        ]
    )
    return save(tensors)

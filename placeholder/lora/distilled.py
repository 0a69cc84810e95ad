"""The step-distilled LoRA that `go_fast` draws with: where it comes from, the steps it was made for, and its schedule."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torch import Tensor

from placeholder.errors import label
from placeholder.lora.adapter import check_lora
from placeholder.lora.safetensors import looks_like_safetensors
from placeholder.model.base import DEFAULT_MODEL, BaseModel
from placeholder.model.download import fetch_file
from placeholder.model.loading import transformer_shell
from placeholder.options import whole
from placeholder.request import MAX_STEPS, Request
from placeholder.service.files import URL_SCHEMES, local_file
from placeholder.weights.archive import read_weights

Log = Callable[[str], None]
FAST_VARIABLE, STEPS_VARIABLE = "QWEN_IMAGE_FAST_LORA", "QWEN_IMAGE_FAST_STEPS"
NONE = "none"  # what the variable holds where the published LoRA is not wanted either
# For DEFAULT_MODEL; Apache-2.0, 1.7 GB. The commit is the one that uploaded the file.
PUBLISHED = (
    "lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-8steps-V2.0.safetensors@813e69cd4c5627f2c7b921667f79690a0e12bd4e"
)
ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)/([\w.-]+(?:/[\w.-]+)*\.safetensors)@(\w[\w.-]*(?:/\w[\w.-]*)*)")
# A fixed shift of 3 whatever the size, and no stretching of the end: the model card of lightx2v/Qwen-Image-Lightning.
SCHEDULE = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "shift": 1.0,
    "shift_terminal": None,
}


@dataclass(frozen=True)
class FastLora:
    """A step-distilled LoRA with alpha = rank and keys without `transformer.`, and the number of steps it was made for."""

    name: str
    steps: int
    lora: dict[str, Tensor]

    def ask(self, request: Request) -> Request:
        """The request as this LoRA draws it: without guidance, in its number of steps or fewer where fewer are asked for."""
        return replace(request, guidance=1.0, steps=min(request.steps, self.steps))


def line_of(fast: FastLora | None) -> str:
    """What the log says of a request with `go_fast`."""
    if fast is None:
        return "go_fast: first-block cache, as there is no step-distilled LoRA at hand"
    return (
        f"go_fast: step-distilled LoRA {fast.name}, at most {fast.steps} steps; guidance and the negative prompt are not used"
    )


def load_fast_lora(base: BaseModel, log: Log) -> FastLora | None:
    """The LoRA that QWEN_IMAGE_FAST_LORA names (a path, a URL, or owner/name/file.safetensors@revision on the hub), checked.

    Unset, it is the published one for Qwen/Qwen-Image. None, and the log says why, for another base model, for `none`, and
    where the published one cannot be had. Raises ValueError, one sentence, where the one that is named cannot be used. Of the
    base model only the configuration is read.
    """
    source, steps = os.environ.get(FAST_VARIABLE, ""), os.environ.get(STEPS_VARIABLE)
    given_steps = whole(STEPS_VARIABLE, steps, 1, MAX_STEPS) if steps else None
    if source == NONE or not (source or base.source == DEFAULT_MODEL):
        why = f"{FAST_VARIABLE} is {source or 'not set'}"
        log(f"go_fast: no step-distilled LoRA ({why}), so it is the first-block cache")
        return None
    try:
        found = _load(source or PUBLISHED, given_steps, base, log)
    except ValueError as error:
        if source:
            raise ValueError(f"{FAST_VARIABLE} cannot be used: {error}") from error
        log(f"Warning: go_fast has no step-distilled LoRA, so it is the first-block cache: {error}")
        return None
    log(f"go_fast: step-distilled LoRA {found.name}, {found.steps} steps, {len(found.lora)} tensors")
    return found


def _load(source: str, steps: int | None, base: BaseModel, log: Log) -> FastLora:
    on_the_hub = None if Path(source).is_file() else ON_THE_HUB.fullmatch(source)
    at = on_the_hub[2] if on_the_hub else unquote(urlsplit(source).path) if source.startswith(URL_SCHEMES) else source
    name = label(at.rsplit("/", 1)[-1])
    steps = steps or steps_of(name)
    with local_file(str(fetch_file(*on_the_hub.groups(), log)) if on_the_hub else source) as path:
        if not path.is_file():
            raise ValueError(f"{label(source)} is neither a file nor a URL nor owner/name/file.safetensors@revision")
        with path.open("rb") as file:
            if not looks_like_safetensors(file.read(9)):
                raise ValueError(f"{name} is not a safetensors file: give the step-distilled LoRA as it was published")
        lora = read_weights(path).lora
    check_lora(transformer_shell(base), lora)
    return FastLora(name, steps, {key: value.to(base.dtype) for key, value in lora.items()})


def steps_of(name: str) -> int:
    """The number of steps in a file's name, such as 8 in `...-8steps-V2.0.safetensors`; ValueError unless there is just one."""
    found = set(re.findall(r"(?<![0-9])([0-9]{1,3})[-_ ]?steps?(?![a-z])", name.lower()))
    if len(found) != 1:
        raise ValueError(
            f"{name} does not say for how many steps it was distilled: name it such as lora-8steps.safetensors, or set {STEPS_VARIABLE}"
        )
    return whole(f"the number of steps in {name}", found.pop(), 1, MAX_STEPS)

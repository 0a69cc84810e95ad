"""The step-distilled LoRA of `go_fast`: where it comes from, and the number of steps it was distilled for."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torch import Tensor

from placeholder.errors import Log, label
from placeholder.lora.adapter import check_lora
from placeholder.lora.formats import read_lora_file
from placeholder.model.base import QWEN_IMAGE, BaseModel
from placeholder.model.download import URL_SCHEMES, fetch_file, local_file
from placeholder.model.loading import transformer_shell
from placeholder.options import whole
from placeholder.request import MAX_STEPS, Request

FAST_VARIABLE, STEPS_VARIABLE = "QWEN_IMAGE_FAST_LORA", "QWEN_IMAGE_FAST_STEPS"
NONE = "none"  # the variable's value where the published LoRA is not wanted either
ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)/([\w.-]+(?:/[\w.-]+)*\.safetensors)@(\w[\w.-]*(?:/\w[\w.-]*)*)")


@dataclass(frozen=True)
class FastLora:
    """A step-distilled LoRA with alpha = rank and keys without `transformer.`, and the number of steps it was distilled for."""

    name: str
    steps: int
    lora: dict[str, Tensor]

    def adapt(self, request: Request) -> Request:
        """The request for this LoRA: without guidance, and in at most the number of steps that it was distilled for."""
        return replace(request, guidance=1.0, steps=min(request.steps, self.steps))


def line_of(fast: FastLora | None) -> str:
    """The log line of a request with `go_fast`."""
    if fast is None:
        return "go_fast: first-block cache, as no step-distilled LoRA is available"
    return (
        f"go_fast: step-distilled LoRA {fast.name}, at most {fast.steps} steps; guidance and the negative prompt are not used"
    )


def load_fast_lora(base: BaseModel, log: Log, fetch: Callable[..., Path] = fetch_file) -> FastLora | None:
    """The LoRA that QWEN_IMAGE_FAST_LORA names (a path, a URL, or owner/name/file.safetensors@revision on the hub), checked.

    Unset, it is the published one of the base model. None, and the log says why, for a base model without one, for `none`, and
    where the published one cannot be fetched. QWEN_IMAGE_FAST_STEPS is the number of steps where its name does not tell. Raises
    ValueError, one sentence, where the named one or that number cannot be used. Of the base model only the configuration is
    read.
    """
    source = os.environ.get(FAST_VARIABLE, "")
    published = QWEN_IMAGE.published.get(base.source)
    if source == NONE or not (source or published):
        log(f"go_fast: no step-distilled LoRA ({FAST_VARIABLE} is {source or 'not set'}), so it is the first-block cache")
        return None
    given = os.environ.get(STEPS_VARIABLE)
    steps = whole(STEPS_VARIABLE, given, 1, MAX_STEPS) if given else None
    try:
        fast = _load(source or published.distilled_lora, steps, base, log, fetch)
    except ValueError as error:
        if source:
            raise ValueError(f"{FAST_VARIABLE} cannot be used: {error}") from error
        log(f"Warning: go_fast has no step-distilled LoRA, so it is the first-block cache: {error}")
        return None
    log(f"go_fast: step-distilled LoRA {fast.name}, {fast.steps} steps, {len(fast.lora)} tensors")
    return fast


def _load(source: str, steps: int | None, base: BaseModel, log: Log, fetch: Callable[..., Path]) -> FastLora:
    on_the_hub = None if Path(source).is_file() else ON_THE_HUB.fullmatch(source)
    at = on_the_hub[2] if on_the_hub else unquote(urlsplit(source).path) if source.startswith(URL_SCHEMES) else source
    name = label(at.rsplit("/", 1)[-1])
    steps = steps or steps_of(name)
    with local_file(str(fetch(*on_the_hub.groups(), log)) if on_the_hub else source) as path:
        if not path.is_file():
            raise ValueError(f"{label(source)} is neither a file nor a URL nor owner/name/file.safetensors@revision")
        lora = read_lora_file(name, path).lora
    check_lora(transformer_shell(base), lora)
    return FastLora(name, steps, {key: value.to(base.dtype) for key, value in lora.items()})


def steps_of(name: str) -> int:
    """The number of steps in a file's name, such as 8 in `...-8steps-V2.0.safetensors`.

    Raises ValueError for a name without just one such number.
    """
    found = set(re.findall(r"(?<![0-9])([0-9]{1,3})[-_ ]?steps?(?![a-z])", name.lower()))
    if len(found) != 1:
        raise ValueError(
            f"{name} does not say for how many steps it was distilled: name it such as lora-8steps.safetensors, "
            f"or set {STEPS_VARIABLE}"
        )
    return whole(f"the number of steps in {name}", found.pop(), 1, MAX_STEPS)

"""Placement of a prediction's models: on the GPU as far as they fit, the other layers offloaded to host memory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from placeholder.devices import KEPT_FREE
from placeholder.model.base import BaseModel
from placeholder.model.loading import text_encoder_bytes, text_encoder_shell, transformer_shell

DECODING = 6_000_000_000  # bytes: an image of 1328x1328 pixels needs 5.9 GB in bf16, see `decoding_bytes`


class Sizes(NamedTuple):
    """The bytes of a model and of its largest layer, and how many layers it has."""

    whole: int
    layer: int
    layers: int

    def offloaded(self, room: int) -> int:
        """How many layers to offload to fit into `room` bytes: none, or so many that there is room for decoding too."""
        if self.whole <= room:
            return 0
        return min(self.layers, 1 + math.ceil((self.whole + DECODING - room) / self.layer))

    def taken(self, offloaded: int) -> int:
        """Bytes on the device: of the offloaded layers one is there, while it computes."""
        return self.whole - max(0, offloaded - 1) * self.layer


class Placement(NamedTuple):
    """How many layers of each model are offloaded, and the log line that says so."""

    text_encoder: int
    transformer: int
    line: str


def place(transformer: Sizes, text_encoder: Sizes, free: int) -> Placement:
    """The placement of models where `free` bytes are free on the device.

    The text encoder is offloaded first: it runs once a prompt, the transformer in every step. A tenth of the memory is left to
    the VAE and the activations.
    """
    usable = round((1 - KEPT_FREE) * free)
    layers = text_encoder.offloaded(usable - transformer.whole)
    blocks = transformer.offloaded(usable - text_encoder.taken(layers))
    line = (
        f"Memory: {usable / 1e9:.3g} GB may be used; {_where('transformer', transformer, blocks)}, "
        f"{_where('text encoder', text_encoder, layers)}"
    )
    return Placement(layers, blocks, line)


def _where(name: str, sizes: Sizes, offloaded: int) -> str:
    where = f"{offloaded} of its {sizes.layers} layers offloaded to the host's memory" if offloaded else "on the device"
    return f"{name} ({sizes.whole / 1e9:.3g} GB) {where}"


def placement_of(base: BaseModel, free: int) -> Placement:
    """The placement of a base model where `free` bytes are free; from its configuration, no weights are read."""
    transformer, text_encoder = transformer_shell(base), text_encoder_shell(base)
    sizes = (
        Sizes(_bytes([transformer]), _bytes(transformer.transformer_blocks[:1]), len(transformer.transformer_blocks)),
        Sizes(text_encoder_bytes(base), _bytes(text_encoder.layers[:1]), len(text_encoder.layers)),
    )
    return place(*sizes, free)


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())

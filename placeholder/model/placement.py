"""Placement of a prediction's models: on the GPU if they fit, otherwise offloaded to host memory layer by layer."""

from dataclasses import dataclass

from placeholder.devices import KEPT_FREE
from placeholder.model.base import BaseModel
from placeholder.model.loading import text_encoder_bytes, transformer_shell


@dataclass(frozen=True)
class Placement:
    """Which models are offloaded to host memory, and the log line that says so."""

    offload_text_encoder: bool
    offload_transformer: bool
    line: str


def place(transformer: int, text_encoder: int, free: int) -> Placement:
    """The placement of models of so many bytes where `free` bytes are free on the device.

    The text encoder is offloaded first: it runs once a prompt, the transformer in every step. A tenth of the memory is left to
    the VAE and the activations.
    """
    usable = round((1 - KEPT_FREE) * free)
    offload_text_encoder = transformer + text_encoder > usable
    offload_transformer = offload_text_encoder and transformer > usable
    where = {False: "on the device", True: "offloaded layer by layer"}
    line = (
        f"Memory: {usable / 1e9:.3g} GB may be used; transformer ({transformer / 1e9:.3g} GB) {where[offload_transformer]}, "
        f"text encoder ({text_encoder / 1e9:.3g} GB) {where[offload_text_encoder]}"
    )
    return Placement(offload_text_encoder, offload_transformer, line)


def placement_of(base: BaseModel, free: int | None = None) -> Placement:
    """The placement of a base model in `free` bytes, by default those free now; from its configuration, no weights are read."""
    transformer = sum(parameter.nbytes for parameter in transformer_shell(base).parameters())
    return place(transformer, text_encoder_bytes(base), base.free_bytes() if free is None else free)

"""Where the models of a prediction lie: on the GPU as far as they fit there, otherwise offloaded to the host layer by layer."""

from dataclasses import dataclass

from placeholder.devices import KEPT_FREE
from placeholder.model.base import BaseModel
from placeholder.model.loading import text_encoder_shell, transformer_shell
from placeholder.model.quantization import stored_bytes


@dataclass(frozen=True)
class Placement:
    """Which models stay in the host's memory and are streamed to the GPU, and the line that says so."""

    stream_text_encoder: bool
    stream_transformer: bool
    line: str


def place(transformer: int, text_encoder: int, free: int) -> Placement:
    """The placement of models of so many bytes where `free` bytes are free on the device.

    The text encoder goes first, because it runs once a prompt and the transformer in every step. A tenth of the memory is
    left to the VAE and the activations.
    """
    usable = round((1 - KEPT_FREE) * free)
    stream_text_encoder = transformer + text_encoder > usable
    stream_transformer = stream_text_encoder and transformer > usable
    how = {False: "on the device", True: "streamed layer by layer"}
    line = (
        f"Memory: {usable / 1e9:.3g} GB may be used; transformer ({transformer / 1e9:.3g} GB) {how[stream_transformer]}, "
        f"text encoder ({text_encoder / 1e9:.3g} GB) {how[stream_text_encoder]}"
    )
    return Placement(stream_text_encoder, stream_transformer, line)


def placement_of(base: BaseModel, free: int) -> Placement:
    """The placement of a base model where `free` bytes are free, from its configuration: no weights are read."""
    transformer, text_encoder = transformer_shell(base), text_encoder_shell(base)
    return place(
        stored_bytes(transformer, transformer, "full"),
        stored_bytes(text_encoder, text_encoder, "full"),
        free,
    )

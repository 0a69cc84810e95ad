"""The transformer's modulations as a table: they depend on the timestep alone, and take a third of its weights."""

import math
from bisect import bisect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from placeholder.devices import stack_on, to_device

STREAMS = ("img_mod", "txt_mod")  # of a block: SiLU and a linear layer D -> 6 D each
# Sample images in a training ask for sigmas between those of the grid (training/flow.py): half its distance, and half of
# bf16's.
TOLERANCE = 0.0005 + 1 / 512


class TableRow(nn.Module):
    """Takes the place of a layer that computes from the timestep embedding: picks its result from a row of the table."""

    def __init__(self, number: int, width: int):
        super().__init__()
        self.width = width
        # As a tensor: a number would be compiled into each block, and each block would be compiled by itself.
        self.register_buffer("number", torch.tensor([number]), persistent=False)

    def forward(self, table: Tensor) -> Tensor:
        """From what ModulationTable gives (B, 2 blocks + 1, 6 D) to this layer's part (B, width)."""
        return table.index_select(1, self.number)[:, 0, : self.width]


class ModulationTable(nn.Module):
    """Takes the place of the timestep embedder: looks up what all modulation layers give for a batch's sigmas.

    `sigmas` (N) ascend. `rows` (N, 2 blocks + 1, 6 D) lies in the host's memory: the modulations of both streams of every
    block, and last the timestep embedding itself, which the output norm reads.
    """

    def __init__(self, sigmas: list[float], rows: Tensor):
        super().__init__()
        self.sigmas = sigmas  # ascending
        self.rows = rows

    def forward(self, timestep: Tensor, hidden_states: Tensor, _additional_t_cond: None = None) -> Tensor:
        """The rows (B, 2 blocks + 1, 6 D) of the sigmas nearest to (B,); rows that were looked up already stay as they are."""
        return timestep if timestep.ndim == self.rows.ndim else self.look_up(timestep, hidden_states.device)

    def look_up(self, sigmas: Tensor, device: torch.device) -> Tensor:
        """The rows (B, 2 blocks + 1, 6 D) of the sigmas nearest to (B,), on the device.

        Sigmas on the CPU are looked up without waiting for the device. Raises RuntimeError for one further than TOLERANCE from
        all.
        """
        return stack_on([self.rows[self._nearest(sigma)] for sigma in sigmas.to(self.rows.dtype).tolist()], device)

    def _nearest(self, sigma: float) -> int:
        above = bisect(self.sigmas, sigma)
        number = min((above - 1, above), key=lambda i: abs(self.sigmas[i] - sigma) if 0 <= i < len(self.sigmas) else math.inf)
        if abs(self.sigmas[number] - sigma) > TOLERANCE:
            raise RuntimeError(f"the table of modulations has no sigma near {sigma}: it was made for others")
        return number


def modulation_layers(transformer: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that a table replaces."""
    return (getattr(block, name)[1] for block in transformer.transformer_blocks for name in STREAMS)


def depend_on_timestep_alone(transformer: nn.Module) -> bool:
    """Whether the modulations do, as in Qwen-Image; in models that edit images they depend on more."""
    return not (transformer.config.zero_cond_t or transformer.config.use_additional_t_cond)


def row_bytes(transformer: nn.Module) -> int:
    """Bytes of the table for one sigma."""
    layer = next(modulation_layers(transformer))
    return (len(STREAMS) * len(transformer.transformer_blocks) + 1) * layer.out_features * layer.weight.itemsize


def timesteps(transformer: nn.Module, sigmas: Tensor, device: torch.device) -> Tensor:
    """What the transformer takes as its timesteps for sigmas (B,) of the CPU: them, or their rows of its table."""
    embedder = transformer.time_text_embed
    return embedder.look_up(sigmas, device) if isinstance(embedder, ModulationTable) else to_device(sigmas, device)


@torch.no_grad()
def tabulate(transformer: nn.Module, sigmas: Tensor, device: torch.device) -> None:
    """Replace the modulations by a table for the sigmas (N,), rounded to the transformer's dtype.

    Each layer goes to the device alone and is dropped there. Each sigma is computed by itself, as in a batch of one, so that
    such a batch gets the same modulations bit for bit.
    """
    sigmas, blocks = sigmas.to(transformer.dtype).unique(), transformer.transformer_blocks
    width = next(modulation_layers(transformer)).out_features
    rows = torch.empty((len(sigmas), len(STREAMS) * len(blocks) + 1, width), dtype=transformer.dtype)
    embedder = transformer.time_text_embed.to(device)
    like = torch.empty(0, dtype=transformer.dtype, device=device)
    embeddings = [embedder(sigma, like) for sigma in sigmas.to(device).split(1)]  # (1, D) each
    last = rows.shape[1] - 1
    rows[:, last].zero_()  # it is narrower than the others
    rows[:, last, : transformer.inner_dim] = torch.cat(embeddings).cpu()
    for number, block in enumerate(blocks):
        for offset, name in enumerate(STREAMS):
            layer, index = getattr(block, name).to(device), len(STREAMS) * number + offset
            rows[:, index] = torch.cat([layer(embedding) for embedding in embeddings]).cpu()
            setattr(block, name, TableRow(index, width))
    transformer.norm_out.silu = nn.Sequential(TableRow(last, transformer.inner_dim), transformer.norm_out.silu)
    transformer.time_text_embed = ModulationTable(sigmas.tolist(), rows)

"""The transformer's modulations as a table: they depend on the noise level alone, and a third of its weights compute nothing else."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from placeholder.devices import stack_on

STREAMS = ("img_mod", "txt_mod")  # of a block: SiLU and a linear layer D -> 6 D each


class Row(nn.Module):
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
    """Takes the place of the timestep embedder: looks up what the noise levels of a batch come to in all layers.

    `rows` (N, 2 blocks + 1, 6 D) lies in the host's memory and stays there: the modulations of both streams of every block, and last
    the timestep embedding itself, which the output norm reads.
    """

    def __init__(self, levels: list[float], rows: Tensor):
        super().__init__()
        self.numbers = {level: number for number, level in enumerate(levels)}
        self.rows = rows

    def forward(self, timestep: Tensor, hidden_states: Tensor, _additional_t_cond: None = None) -> Tensor:
        """The rows (B, 2 blocks + 1, 6 D) of the noise levels (B,), on the device of the hidden states.

        Levels on the CPU are looked up without waiting for the device. Raises RuntimeError for one that is not in the table.
        """
        levels = timestep.tolist()
        missing = [level for level in levels if level not in self.numbers]
        if missing:
            raise RuntimeError(f"the table of modulations has no noise level {missing[0]}: it was made for others")
        return stack_on([self.rows[self.numbers[level]] for level in levels], hidden_states.device)


def modulation_layers(transformer: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that a table replaces."""
    return (getattr(block, name)[1] for block in transformer.transformer_blocks for name in STREAMS)


def depend_on_noise_alone(transformer: nn.Module) -> bool:
    """Whether the modulations do, as in Qwen-Image; in models that edit pictures they depend on more."""
    return not (transformer.config.zero_cond_t or transformer.config.use_additional_t_cond)


def row_bytes(transformer: nn.Module) -> int:
    """Bytes of the table for one noise level."""
    layer = next(modulation_layers(transformer))
    return (len(STREAMS) * len(transformer.transformer_blocks) + 1) * layer.out_features * layer.weight.itemsize


def timestep_device(transformer: nn.Module) -> torch.device:
    """Where the transformer takes its timesteps: a table looks them up on the CPU."""
    return torch.device("cpu") if isinstance(transformer.time_text_embed, ModulationTable) else transformer.device


@torch.no_grad()
def tabulate(transformer: nn.Module, levels: Tensor, device: torch.device) -> None:
    """Replace the modulations by a table for the noise levels (N,), rounded to the transformer's dtype.

    Each layer goes to the device alone and is dropped there. Each level is computed by itself, as in a batch of one, so that such a
    batch gets the same modulations bit for bit.
    """
    levels, blocks = levels.to(transformer.dtype).unique(), transformer.transformer_blocks
    width = next(modulation_layers(transformer)).out_features
    rows = torch.empty((len(levels), len(STREAMS) * len(blocks) + 1, width), dtype=transformer.dtype)
    embedder = transformer.time_text_embed.to(device)
    like = torch.empty(0, dtype=transformer.dtype, device=device)
    embeddings = [embedder(level, like) for level in levels.to(device).split(1)]  # (1, D) each
    last = rows.shape[1] - 1
    rows[:, last].zero_()  # it is narrower than the others
    rows[:, last, : transformer.inner_dim] = torch.cat(embeddings).cpu()
    for number, block in enumerate(blocks):
        for offset, name in enumerate(STREAMS):
            layer, index = getattr(block, name).to(device), len(STREAMS) * number + offset
            rows[:, index] = torch.cat([layer(embedding) for embedding in embeddings]).cpu()
            setattr(block, name, Row(index, width))
    transformer.norm_out.silu = nn.Sequential(Row(last, transformer.inner_dim), transformer.norm_out.silu)
    transformer.time_text_embed = ModulationTable(levels.tolist(), rows)

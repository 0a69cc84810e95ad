"""Activation checkpointing: same gradients, less kept, as few blocks as the free memory demands."""

import pytest
import torch

from placeholder.lora.adapter import add_lora
from placeholder.training.losses import Denoiser
from placeholder.transformer.checkpointing import BlockCheckpointing, Footprint, measure, saved_bytes
from standin.small_base import Size, new_transformer

BLOCKS = 5


class Forward:
    """A forward pass of a transformer of five blocks with a LoRA that is not zero, always of the same inputs."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = new_transformer(Size(text_width=32, text_layers=1, blocks=BLOCKS, heads=2, vae_width=8))
        self.transformer.requires_grad_(False)
        self.lora = add_lora(self.transformer, 4, seed=0)
        with torch.no_grad():
            for parameter in self.lora:
                parameter.normal_(std=0.1)
        self.noisy, self.embeds = torch.randn(2, 16, 64), torch.randn(2, 7, 32)

    def loss(self) -> torch.Tensor:
        return Denoiser(self.transformer)(self.noisy, torch.full((2,), 0.5), self.embeds, (4, 4)).square().mean()

    def gradients(self, checkpointed: int) -> list[torch.Tensor]:
        BlockCheckpointing(self.transformer, checkpointed)
        return list(torch.autograd.grad(self.loss(), self.lora, allow_unused=True, materialize_grads=True))

    def saved(self, checkpointed: int) -> int:
        BlockCheckpointing(self.transformer, checkpointed)
        return saved_bytes(self.loss, self.transformer.parameters())


@pytest.fixture(scope="module")
def forward() -> Forward:
    return Forward()


def test_saved_bytes_counts_each_storage_once_and_leaves_parameters_out():
    weight = torch.randn(100, requires_grad=True)

    def compute() -> torch.Tensor:
        grown = weight.exp()  # its result is kept for its own backward pass, and twice for that of the product
        return grown * grown

    assert saved_bytes(compute) == 400
    assert saved_bytes(lambda: weight * weight) == 400
    assert saved_bytes(lambda: weight * weight, [weight]) == 0


def test_the_footprint_of_two_blocks_foretells_what_all_of_them_keep(forward):
    footprint = measure(forward.transformer, forward.loss, ())
    assert footprint.blocks == BLOCKS == len(forward.transformer.transformer_blocks)
    assert footprint.rest + BLOCKS * footprint.block == forward.saved(0)
    assert footprint.checkpointed_block == 2 * (16 + 7) * 64 * 4  # batch, tokens of both streams, width, bytes
    assert footprint.block > 10 * footprint.checkpointed_block


@pytest.mark.parametrize("checkpointed", range(1, BLOCKS))
def test_checkpointing_changes_no_bit_of_the_gradients_and_keeps_less(forward, checkpointed):
    footprint = measure(forward.transformer, forward.loss, ())
    for gradient, other in zip(forward.gradients(0), forward.gradients(checkpointed), strict=True):
        assert torch.equal(gradient, other)
    # The first block keeps a little less than the others, because nothing before it learns.
    spared = footprint.block - footprint.checkpointed_block
    assert forward.saved(1) - forward.saved(checkpointed) == (checkpointed - 1) * spared
    assert 0.8 * spared < forward.saved(0) - forward.saved(1) < spared


@pytest.mark.parametrize(
    ("free", "expected"), [(1000, 0), (760, 0), (759, 1), (670, 1), (669, 2), (581, 2), (100, 6), (0, 6), (-50, 6)]
)
def test_as_few_blocks_are_checkpointed_as_the_free_bytes_demand(free, expected):
    footprint = Footprint(blocks=6, block=100, checkpointed_block=10, rest=60)
    assert footprint.total(0) == 760
    assert footprint.blocks_to_checkpoint(free) == expected


def test_nothing_is_checkpointed_where_that_saves_nothing():
    assert Footprint(blocks=6, block=10, checkpointed_block=10, rest=60).blocks_to_checkpoint(0) == 0


def test_the_number_rises_by_an_eighth_of_the_blocks_until_all_are_checkpointed(forward):
    checkpointing = BlockCheckpointing(forward.transformer, 3)
    checkpointing.checkpoint_more()
    assert checkpointing.checkpointed == 4 and not checkpointing.all_checkpointed
    checkpointing.checkpoint_more()
    checkpointing.checkpoint_more()
    assert checkpointing.checkpointed == 5 and checkpointing.all_checkpointed

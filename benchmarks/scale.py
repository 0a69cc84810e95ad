"""What a training and an image cost at full size, counted without weights and without a GPU: arithmetic and memory.

`make scale` writes the tables of docs/hardware.md.
"""

from dataclasses import replace

import torch

from benchmarks.flops import flop_counter
from benchmarks.full_size import RandomBase
from checks.docs_tables import DOCS, write_table
from placeholder.config import TrainConfig
from placeholder.model.base import QWEN_IMAGE
from placeholder.model.loading import text_encoder_shell, transformer_shell
from placeholder.training.memory_plan import fake_step, memory_needs

BLOCKS = 60
BASE = RandomBase("Qwen-Image", torch.device("cuda"), torch.bfloat16)  # for its plan: nothing is put there
SIDES, TEXT_TOKENS, RANKS = (512, 768, 1024, 1328), 128, (8, 32, 128)
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
GUIDED_STEPS = 50  # of an image, two forward passes each


def grid(side: int) -> tuple[int, int]:
    """Height and width in image tokens."""
    return side // 16, side // 16


def prompt(text_tokens: int) -> int:
    """Ids of a prompt of so many tokens inside the template."""
    return QWEN_IMAGE.dropped_tokens + text_tokens


def step_flops(config: TrainConfig, side: int, text_tokens: int, backward: bool = True) -> int:
    """FLOPs of one training step of batch 1 without recomputation, or of its forward pass alone.

    Counted on two and three blocks: all blocks but the first cost the same.
    """
    two, three = (_flops(config, side, text_tokens, backward, blocks) for blocks in (2, 3))
    return three + (BLOCKS - 3) * (three - two)


def _flops(config: TrainConfig, side: int, text_tokens: int, backward: bool, blocks: int) -> int:
    base = replace(BASE, sizes=BASE.sizes | {"transformer": {"num_layers": blocks}})
    shells = transformer_shell(base), text_encoder_shell(base)
    with (
        fake_step(*shells, config.rank, config.batch_size, config.tokens, grid(side), prompt(text_tokens)) as loss,
        flop_counter() as counted,
    ):
        found = loss()
        if backward:
            found.backward()
    return counted.get_total_flops()


def arithmetic_table() -> list[str]:
    """TFLOP by resolution, at rank 32 and 128 text tokens."""
    lines = [
        "| side | step | step with all blocks checkpointed | step, token | step, token, preservation | image, 50 steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        plain, token = (step_flops(TrainConfig(**options), side, TEXT_TOKENS) for options in ({}, TOKEN))
        forward = step_flops(TrainConfig(), side, TEXT_TOKENS, backward=False)
        # In a preserved step two prompts are predicted with the LoRA off, and on with a backward pass; one of them is empty.
        empty = step_flops(TrainConfig(), side, 1) + step_flops(TrainConfig(), side, 1, backward=False)
        preserved = token + (forward + plain + empty) / TrainConfig.prior_preservation_interval
        cells = (plain, plain + forward, token, preserved, 2 * GUIDED_STEPS * forward)
        lines.append(f"| {side} | " + " | ".join(f"{cell / 1e12:.1f}" for cell in cells) + " |")
    return lines


def memory_table() -> list[str]:
    """Peak GB of a training with no and with all blocks checkpointed, at 128 text tokens and batch 1."""
    lines = [
        "| side | rank | token | bf16 | bf16, table | int8, table | nf4, table |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        for rank in RANKS:
            for options in ({}, TOKEN):
                needs = memory_needs(BASE, TrainConfig(rank=rank, **options), grid(side), prompt(TEXT_TOKENS))
                cells = [f"{need.peak(0) / 1e9:.0f} to {need.peak(need.footprint.blocks) / 1e9:.0f}" for need in needs]
                lines.append(f"| {side} | {rank} | {'yes' if options else 'no'} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Write both tables."""
    lines = [f"TFLOP, batch 1, rank 32, {TEXT_TOKENS} text tokens:", "", *arithmetic_table(), ""]
    lines += [f"GB, batch 1, {TEXT_TOKENS} text tokens, with no to all blocks checkpointed:", "", *memory_table()]
    write_table(DOCS / "hardware.md", "scale", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

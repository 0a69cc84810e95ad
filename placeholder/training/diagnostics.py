"""Diagnostics of a trained token: whether the model uses it, and which vocabulary entries it is near to."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from placeholder.lora.adapter import without_lora
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.tokens.vocabulary import ROWS_AT_ONCE, row_norms
from placeholder.training.context import Training
from placeholder.training.examples import Example, Sample, draw_sample
from placeholder.training.losses import sample_losses

SAMPLES = 16
SEED = 0
NEAREST = 5
SMALL_SHARE = 0.05  # of what the training gained


@dataclass(frozen=True)
class Diagnostics:
    """Mean losses on the same noise, and each token's nearest vocabulary entries with their cosines.

    `loss`: trained embeddings and LoRA. `loss_row_reset`: the embeddings as before training, with the LoRA. `loss_lora_off`:
    the trained embeddings alone. `loss_base`: neither. `unchanged`: the tokens whose embeddings are still those of the start.
    """

    loss: float
    loss_row_reset: float
    loss_lora_off: float
    loss_base: float
    nearest_tokens: dict[str, list[list]]
    unchanged: list[str]

    @property
    def row_share(self) -> float:
        """Share of what training gained that is lost with the embeddings reset: near 0 where the LoRA carries the subject."""
        gained = self.loss_base - self.loss
        return (self.loss_row_reset - self.loss) / gained if gained > 0 else 0.0

    def lines(self) -> list[str]:
        """The findings as a person reads them."""
        lines = [
            f"Loss on fixed noise: {self.loss:.4f}; with the token's embedding reset {self.loss_row_reset:.4f}; "
            f"without the LoRA {self.loss_lora_off:.4f}; base model {self.loss_base:.4f}"
        ]
        for token, nearest in self.nearest_tokens.items():
            lines.append(f"Nearest to {token}: " + ", ".join(f"{entry!r} {cosine:.2f}" for entry, cosine in nearest))
        if self.unchanged:
            lines.append(
                f"Warning: the embedding of {', '.join(self.unchanged)} is as it was before training: no step had a prompt "
                "with the token in it, or placeholder_learning_rate is 0"
            )
        if self.loss >= self.loss_base:
            lines.append("Warning: the training did not lower the loss: train for longer, or change learning_rate")
        elif self.row_share < SMALL_SHARE and len(self.unchanged) < len(self.nearest_tokens):
            lines.append(
                f"With the token's embedding reset only {max(self.row_share, 0):.0%} of what training gained is lost: the LoRA "
                "carries the subject; to have the embedding carry more, raise placeholder_learning_rate or "
                "placeholder_warmup_fraction"
            )
        return lines

    def meta(self) -> dict:
        """The findings for meta.json."""
        return {"diagnostics": asdict(self) | {"row_share": self.row_share}}


def fixed_samples(examples: list[Example]) -> list[Sample]:
    """What the losses are measured on: the same noise and sigmas every time."""
    generator = torch.Generator().manual_seed(SEED)
    return [draw_sample(examples[i % len(examples)], (), 0.0, generator) for i in range(SAMPLES)]


@torch.no_grad()
def diagnose(training: Training) -> Diagnostics:
    """Measure a training with tokens, after its last step."""
    state, tokens = training.state, training.tokens
    samples = fixed_samples(state.sampler.examples)

    def loss() -> float:
        # One at a time: stacked, they would take more memory than any step of the training has.
        return torch.cat([sample_losses(state.denoiser, state.prompt_embeds, [sample]) for sample in samples]).mean().item()

    def both(lora_off: bool) -> tuple[float, float]:
        with without_lora(state.transformer) if lora_off else nullcontext():
            trained = loss()
            with rows_as(tokens, training.initial_rows):
                return trained, loss()

    (trained, row_reset), (lora_off, base) = both(lora_off=False), both(lora_off=True)
    vocabulary = training.prompt_embeds.text_encoder.embed_tokens.weight
    with rows_as(tokens, training.initial_rows):
        initial = tokens.embeddings()
    unchanged = [token for token, rows in tokens.embeddings().items() if torch.equal(rows, initial[token])]
    return Diagnostics(trained, row_reset, lora_off, base, nearest_tokens(tokens, vocabulary, training.tokenizer), unchanged)


@contextmanager
def rows_as(tokens: PlaceholderTokens, rows: Tensor) -> Iterator[None]:
    """The tokens with other rows (R, D) for a while."""
    trained = tokens.rows.detach().clone()
    tokens.rows.data.copy_(rows)
    try:
        yield
    finally:
        tokens.rows.data.copy_(trained)


@torch.no_grad()
def nearest_tokens(tokens: PlaceholderTokens, vocabulary: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list]]:
    """For each token the vocabulary entries of the highest cosine with its first row, best first."""
    embeddings = tokens.embeddings()
    rows = torch.stack([rows[0] for rows in embeddings.values()]).to(vocabulary.device)  # (tokens, D)
    norms = row_norms(vocabulary, len(tokenizer))[:, None] * rows.norm(dim=1)
    dots = torch.cat([part.float() @ rows.T for part in vocabulary[: len(tokenizer)].split(ROWS_AT_ONCE)])
    best = (dots / norms.clamp_min(torch.finfo(norms.dtype).tiny)).topk(NEAREST, dim=0)
    return {
        token: [[tokenizer.decode([index]), cosine] for index, cosine in zip(ids, cosines, strict=True)]
        for token, ids, cosines in zip(embeddings, best.indices.T.tolist(), best.values.T.tolist(), strict=True)
    }

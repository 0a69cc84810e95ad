"""The training loop: its loss, its gradients, what it updates, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from placeholder.distributed import SINGLE_PROCESS
from placeholder.lora.adapter import add_lora, without_lora
from placeholder.model.base import BaseModel
from placeholder.model.loading import load_text_encoder, load_transformer, load_vae
from placeholder.model.vae import encode_image
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, initial_embeddings
from placeholder.tokens.prompt_encoder import PromptEncoder, prompt_ids
from placeholder.training.examples import BatchSampler, Example, draw_sample, grouped
from placeholder.training.loop import LORA_MAX_GRAD_NORM, Schedule, TrainState, train_steps
from placeholder.training.losses import Denoiser, inputs_of, preservation_losses, sample_losses
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer
from placeholder.transformer.checkpointing import BlockCheckpointing
from placeholder.transformer.graphs import Passes
from tests.support.parallel_steps import RunningOut
from tests.support.peak import PeakBytes
from tests.support.samples import picture

CAPTIONS = ["a photo of <zwx>", "<zwx> in a garden, at noon", "a close portrait of <zwx>"]
NO_LIMIT = 1e9


class Parts:
    """A transformer with a LoRA, a token, and three examples of two shapes and three prompt lengths."""

    def __init__(self, base, tokenizer, text_encoder, tokens=("<zwx>",), rank=4, captions=CAPTIONS):
        self.transformer = load_transformer(base)
        self.lora = add_lora(self.transformer, rank, seed=0)
        self.denoiser = Denoiser(self.transformer)
        self.passes = Passes(self.denoiser.device, self.transformer, print)
        generator = torch.Generator().manual_seed(0)
        self.tokens = PlaceholderTokens(151665, initial_embeddings(tokens, 32, 1e-5, generator), 32)
        self.prompt_embeds = PromptEncoder(text_encoder, self.tokens)
        grids = [(4, 4), (3, 5), (4, 4)]
        ids = [prompt_ids(tokenizer, self.tokens, caption) for caption in captions]
        self.examples = [
            Example(torch.randn(grid[0] * grid[1], 64, generator=generator), grid, 0.5, caption_ids)
            for grid, caption_ids in zip(grids, ids, strict=True)
        ]
        self.empty_ids = prompt_ids(tokenizer, self.tokens, " ")

    def steps(
        self,
        steps,
        batch_size=1,
        caption_dropout=0.0,
        seed=0,
        lora_optimizer=None,
        token_optimizer=None,
        examples=None,
        warmup_fraction=0.0,
        prior_preservation=0.0,
        prior_preservation_interval=1,
    ):
        """The loop over these parts; LoRA and row stay as they are unless their optimizers are given."""
        optimizer = lora_optimizer or torch.optim.SGD(self.lora, lr=0.0)
        sampler = self.sampler(seed, batch_size, caption_dropout, examples)
        checkpointing = BlockCheckpointing(self.transformer, 0)
        state = TrainState(
            self.denoiser, self.prompt_embeds, self.lora, optimizer, sampler, checkpointing, self.passes, token_optimizer
        )
        schedule = Schedule(steps, round(steps * warmup_fraction), prior_preservation, prior_preservation_interval)
        return train_steps(state, schedule, SINGLE_PROCESS)

    def sampler(self, seed=0, batch_size=1, caption_dropout=0.0, examples=None) -> BatchSampler:
        """The batches of a loop with that seed."""
        generator = torch.Generator().manual_seed(seed)
        return BatchSampler(examples or self.examples, self.empty_ids, batch_size, caption_dropout, generator)

    def wake_lora(self, size=0.05):
        """Give the LoRA's B, zero at first, some size, so that A has a gradient too."""
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in self.lora:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture
def parts(base, tokenizer, text_encoder) -> Parts:
    return Parts(base, tokenizer, text_encoder)


def reference_loss(transformer, latents: Tensor, noise: Tensor, sigma: Tensor, embeds: Tensor, grid: tuple[int, int]) -> Tensor:
    """Liu et al. 2022, arXiv:2209.03003, equation 1, with X_0 the noise and X_1 the data there.

    The model is asked for d x_t / d t of x_t = t noise + (1 - t) data, at t = sigma.
    """
    point = sigma * noise + (1 - sigma) * latents
    velocity = transformer(
        hidden_states=point[None],
        timestep=sigma.view(1),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        img_shapes=[[(1, *grid)]],
    ).sample
    return torch.nn.functional.mse_loss(velocity[0], noise - latents)


def test_the_row_and_the_lora_learn_exactly_as_with_a_gradient_mask_on_the_whole_matrix(parts, base, tokenizer, text_encoder):
    """The reference lets the whole embedding matrix require gradients and zeroes all rows but the token's in a hook."""
    steps, learning_rate = 14, 1e-2
    start = parts.tokens.rows.detach().clone()

    whole, token_id = load_text_encoder(base), 151665
    matrix = whole.embed_tokens.weight.requires_grad_(True)
    with torch.no_grad():
        matrix[token_id] = start[0]
    before = matrix.detach().clone()
    mask = torch.zeros(len(matrix), 1)
    mask[token_id] = 1.0
    matrix.register_hook(lambda gradient: gradient * mask)
    reference = Parts(base, tokenizer, text_encoder)
    row_adamw = torch.optim.AdamW([matrix], lr=learning_rate, weight_decay=0.0)
    lora_adamw = torch.optim.AdamW(reference.lora, lr=1e-3, weight_decay=1e-4)
    sampler, expected = reference.sampler(seed=3), []
    for step in range(1, steps + 1):
        (sample,) = sampler.next_batch()
        embeds = whole(input_ids=torch.tensor([sample.input_ids])).last_hidden_state[:, 34:]
        loss = reference_loss(
            reference.transformer, sample.example.latents, sample.noise, sample.sigma, embeds, sample.example.grid
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.lora, 1.0)
        lora_adamw.step()
        lora_adamw.zero_grad()
        matrix.grad /= matrix.grad[token_id].norm()
        row_adamw.param_groups[0]["lr"] = learning_rate * min(1.0, step / 10)
        row_adamw.step()
        row_adamw.zero_grad()
        expected.append((loss.item(), matrix[token_id].detach().clone()))
    changed = (matrix.detach() != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [token_id]

    rows = TokenOptimizer(parts.tokens.rows, learning_rate, NO_LIMIT)
    loop = parts.steps(steps, seed=3, lora_optimizer=lora_optimizer("adamw", parts.lora, 1e-3), token_optimizer=rows)
    for step, (loss, row) in zip(loop, expected, strict=True):
        assert step.loss.item() == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(parts.tokens.rows.detach()[0], row, rtol=1e-6, atol=1e-7)
    for found, wanted in zip(parts.lora, reference.lora, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert (parts.tokens.rows.detach() - start).norm() > 100 * start.norm()


def test_a_batch_of_mixed_shapes_and_lengths_has_the_mean_gradient_of_its_samples(base, tokenizer, text_encoder):
    parts = Parts(base, tokenizer, text_encoder)
    parts.wake_lora()
    (step,) = parts.steps(1, batch_size=4, caption_dropout=0.6, seed=10)

    singles = Parts(base, tokenizer, text_encoder)
    singles.wake_lora()
    batch = singles.sampler(seed=10, batch_size=4, caption_dropout=0.6).next_batch()
    losses = [sample_losses(singles.denoiser, singles.prompt_embeds, [sample])[0] for sample in batch]
    torch.stack(losses).mean().backward()
    learning = [(found, single) for found, single in zip(parts.lora, singles.lora, strict=True) if single.grad is not None]
    assert torch.nn.utils.get_total_norm([single.grad for _, single in learning]) < 1  # nothing is clipped

    alone, stacked = sorted(grouped(batch), key=len)
    assert (len(alone), len(stacked), len({id(sample.example) for sample in stacked})) == (1, 3, 2)
    assert step.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    torch.testing.assert_close(parts.tokens.rows.grad, singles.tokens.rows.grad, rtol=1e-3, atol=1e-6)
    assert len(learning) >= 30  # what the last block sends to the text is not read, so its output layer gets no gradient
    for found, single in learning:
        torch.testing.assert_close(found.grad, single.grad, rtol=1e-3, atol=1e-6)


def test_the_size_of_the_rows_gradient_does_not_touch_the_lora(base, tokenizer, text_encoder):
    """A shared clip would scale the LoRA's update down by the row's first, huge gradients."""
    learning, frozen = Parts(base, tokenizer, text_encoder), Parts(base, tokenizer, text_encoder)
    frozen.tokens.rows.requires_grad_(False)
    for parts in (learning, frozen):
        parts.wake_lora()
        if parts is learning:
            parts.tokens.rows.register_hook(lambda gradient: gradient * 1e6)
        list(parts.steps(1, lora_optimizer=torch.optim.SGD(parts.lora, lr=1.0)))
    assert learning.tokens.rows.grad.norm() > 1e4
    for found, expected in zip(learning.lora, frozen.lora, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_the_loras_gradient_is_clipped_to_norm_one(parts):
    parts.wake_lora()
    for parameter in parts.lora:
        parameter.register_hook(lambda gradient: gradient * 1e4)
    list(parts.steps(1))
    gradients = [parameter.grad for parameter in parts.lora if parameter.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1.0, rel=1e-3)


def test_preservation_is_nothing_while_the_lora_is_zero_and_then_the_distance_from_the_base(parts, tokenizer):
    plain = prompt_ids(tokenizer, parts.tokens, "a photo of a thing")
    parts.prompt_embeds.cache([plain])
    example = parts.examples[0]
    generator = torch.Generator().manual_seed(2)
    group = [draw_sample(example, parts.empty_ids, 1.0, generator) for _ in range(2)]
    inputs = inputs_of(parts.denoiser, group, parts.prompt_embeds([plain] * 2))
    assert preservation_losses(parts.denoiser, example.grid, *inputs).tolist() == [0.0, 0.0]
    parts.wake_lora()
    losses = preservation_losses(parts.denoiser, example.grid, *inputs)
    for sample, loss in zip(group, losses, strict=True):
        noisy = sample.sigma * sample.noise + (1 - sample.sigma) * example.latents
        arguments = (sample.sigma[None], parts.prompt_embeds([plain]), example.grid)
        with without_lora(parts.transformer):
            base = parts.denoiser(noisy[None], *arguments)
        expected = torch.nn.functional.mse_loss(parts.denoiser(noisy[None], *arguments), base)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    losses.sum().backward()
    assert parts.tokens.rows.grad is None
    assert (
        sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parts.lora) == 28
    )  # what the last block asks and sends as text is not read


def test_preservation_adds_its_gradient_with_its_weight(base, tokenizer, text_encoder):
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        parts = Parts(base, tokenizer, text_encoder)
        parts.wake_lora(0.002)  # so small that nothing is clipped
        plain = prompt_ids(tokenizer, parts.tokens, "a photo of a thing")
        examples = [replace(example, preserved=(plain,)) for example in parts.examples]
        (step,) = parts.steps(1, examples=examples, prior_preservation=weight)
        assert (step.preservation is not None and step.preservation > 0) == (weight > 0)
        gradients.append([parameter.grad for parameter in parts.lora if parameter.grad is not None])
    assert torch.nn.utils.get_total_norm(gradients[2]) < LORA_MAX_GRAD_NORM
    for without, once, thrice in zip(*gradients, strict=True):
        torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-2, atol=1e-10)


def test_every_preserved_prompt_counts(base, tokenizer, text_encoder):
    """The mean preservation losses of a step add up, whatever the lengths of the prompts."""
    prompts = ("a photo of a thing", " ")
    losses = []
    for kept in ((0,), (1,), (0, 1)):
        parts = Parts(base, tokenizer, text_encoder)
        parts.wake_lora()
        ids = [prompt_ids(tokenizer, parts.tokens, prompts[number]) for number in kept]
        parts.prompt_embeds.cache(ids)
        examples = [replace(example, preserved=tuple(ids)) for example in parts.examples]
        (step,) = parts.steps(1, examples=examples, prior_preservation=1.0, batch_size=2)
        losses.append(step.preservation.item())
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5) and min(losses) > 0


def test_preservation_acts_in_every_third_step_once_the_lora_learns(parts, tokenizer):
    plain = prompt_ids(tokenizer, parts.tokens, "a photo of a thing")
    examples = [replace(example, preserved=(plain,)) for example in parts.examples]
    steps = parts.steps(
        12,
        examples=examples,
        warmup_fraction=0.5,
        prior_preservation=1.0,
        prior_preservation_interval=3,
        token_optimizer=TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT),
    )
    assert [step.number for step in steps if step.preservation is not None] == [9, 12]


def test_the_row_learns_alone_first_and_then_the_lora_joins_in(parts):
    rows = TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT)
    optimizer = lora_optimizer("adamw", parts.lora, 1e-2)
    start, row = [parameter.detach().clone() for parameter in parts.lora], parts.tokens.rows.detach().clone()
    moved = []
    for _ in parts.steps(4, lora_optimizer=optimizer, token_optimizer=rows, warmup_fraction=0.5):
        lora_moved = any(not torch.equal(now, before) for now, before in zip(parts.lora, start, strict=True))
        moved.append((lora_moved, not torch.equal(parts.tokens.rows, row)))
    assert moved == [(False, True), (False, True), (True, True), (True, True)]


def test_a_dropped_caption_trains_the_lora_and_leaves_the_row(parts):
    start = parts.tokens.rows.detach().clone()
    before = [parameter.detach().clone() for parameter in parts.lora]
    token_optimizer = TokenOptimizer(parts.tokens.rows, 1e-2, NO_LIMIT)
    parts.prompt_embeds.cache([parts.empty_ids])
    list(
        parts.steps(
            3, caption_dropout=1.0, lora_optimizer=lora_optimizer("adamw", parts.lora, 1e-3), token_optimizer=token_optimizer
        )
    )
    assert torch.equal(parts.tokens.rows.detach(), start)
    assert token_optimizer.steps == 0
    assert not all(torch.equal(a, b) for a, b in zip(parts.lora, before, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_captions_are_dropped_as_often_as_asked(share, parts):
    generator = torch.Generator().manual_seed(0)
    samples = [draw_sample(parts.examples[0], parts.empty_ids, share, generator) for _ in range(2000)]
    dropped = sum(sample.input_ids == parts.empty_ids for sample in samples)
    assert dropped / 2000 == pytest.approx(share, abs=0.03)
    assert all(sample.input_ids in (parts.empty_ids, parts.examples[0].input_ids) for sample in samples)


def test_every_example_comes_once_an_epoch_and_the_sampler_goes_on_from_its_state(parts):
    sampler = parts.sampler(batch_size=3)
    epochs = [[id(sample.example) for sample in sampler.next_batch()] for _ in range(6)]
    assert all(sorted(epoch) == sorted(map(id, parts.examples)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    sampler = parts.sampler(batch_size=2, caption_dropout=0.5)
    sampler.next_batch()
    state = sampler.state_dict()
    expected = [sampler.next_batch() for _ in range(4)]
    again = parts.sampler(seed=7, batch_size=2, caption_dropout=0.5)
    again.load_state_dict(state)
    assert [again.next_batch() for _ in range(4)] == expected


@pytest.mark.parametrize(("tokens", "captions"), [(("<zwx>",), CAPTIONS), ((), [c.replace("<zwx>", "TOK") for c in CAPTIONS])])
def test_overfitting_three_pictures_lowers_the_loss_on_fixed_noise_by_a_fifth(tokens, captions, base, tokenizer, text_encoder):
    parts = Parts(base, tokenizer, text_encoder, tokens, rank=16, captions=captions)
    vae = load_vae(base, torch.float32)
    pictures = [torch.from_numpy(np.array(picture(seed=seed))).permute(2, 0, 1) for seed in range(3)]
    parts.examples = [
        Example(encode_image(vae, pixels), (4, 4), 0.5, example.input_ids)
        for pixels, example in zip(pictures, parts.examples, strict=True)
    ]
    parts.prompt_embeds.cache([parts.empty_ids, *(example.input_ids for example in parts.examples)])
    generator = torch.Generator().manual_seed(123)
    fixed = [draw_sample(example, parts.empty_ids, 0.0, generator) for example in parts.examples for _ in range(8)]

    def loss() -> float:
        with torch.no_grad():
            groups = [sample_losses(parts.denoiser, parts.prompt_embeds, group) for group in grouped(fixed)]
            return torch.cat(groups).mean().item()

    before = loss()
    rows = TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT) if tokens else None
    list(parts.steps(150, lora_optimizer=lora_optimizer("adamw", parts.lora, 1e-2), token_optimizer=rows))
    assert loss() < 0.8 * before


def test_on_a_bf16_base_lora_and_row_stay_fp32_and_learn(base, tokenizer):
    half = BaseModel(base.source, base.device, torch.bfloat16)
    parts = Parts(half, tokenizer, load_text_encoder(half))
    before = [parameter.detach().clone() for parameter in (*parts.lora, parts.tokens.rows)]
    optimizers = {
        "lora_optimizer": lora_optimizer("adamw", parts.lora, 1e-3),
        "token_optimizer": TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT),
    }
    losses = [step.loss for step in parts.steps(3, batch_size=2, **optimizers)]
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses)
    assert parts.transformer.img_in.weight.dtype == torch.bfloat16
    changed = [not torch.equal(now, start) for now, start in zip((*parts.lora, parts.tokens.rows), before, strict=True)]
    assert changed[-1]
    assert sum(changed) > 0.9 * len(changed)
    assert {parameter.dtype for parameter in (*parts.lora, parts.tokens.rows)} == {torch.float32}


def test_a_step_that_runs_out_of_memory_is_repeated_with_more_checkpointed_blocks(parts):
    whole = [(step.loss, step.checkpointed) for step in parts.steps(3, batch_size=2)]
    parts.denoiser = RunningOut(parts.transformer, {3})
    again = [(step.loss, step.checkpointed) for step in parts.steps(3, batch_size=2)]
    assert [checkpointed for _, checkpointed in whole] == [0, 0, 0]
    assert sorted({checkpointed for _, checkpointed in again}) == [0, 1]
    assert all(torch.equal(loss, other) for (loss, _), (other, _) in zip(whole, again, strict=True))


def test_running_out_of_memory_with_every_block_checkpointed_is_an_error(parts):
    parts.denoiser = RunningOut(parts.transformer, range(10))
    with pytest.raises(torch.OutOfMemoryError):
        next(parts.steps(1))


def test_a_step_never_holds_a_gradient_of_the_vocabularys_size(parts):
    """The vocabulary is the real one, of 152,064 rows, on a model so small that its matrix outweighs all else."""
    config = {"token_optimizer": TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT), "batch_size": 2}
    steps = parts.steps(2, **config)
    next(steps)
    with PeakBytes() as counted:
        next(steps)
    matrix = parts.prompt_embeds.text_encoder.embed_tokens.weight
    assert config["token_optimizer"].steps == 2  # the row learned
    assert counted.peak < matrix.nbytes / 4, (counted.peak, matrix.nbytes)

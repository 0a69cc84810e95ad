"""Passes that are captured and replayed, with graphs that run again on the CPU; checks/cuda_graphs.py has real ones."""

import types
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from placeholder.config import TrainConfig
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training import loop
from placeholder.training.losses import Denoiser
from placeholder.training.optimizers import TokenOptimizer, lora_optimizer
from placeholder.transformer import graphs
from tests.conftest import SHORT
from tests.support.samples import train
from tests.training.test_loop import NO_LIMIT, Parts

GPU = torch.device("cuda")
POOL_CALLS = ("beginAllocateCurrentStreamToPool", "endAllocateToPool", "releasePool")


class Rerun:
    """Stands in for `CapturedPass`: tensors of its own with gradients of their own, but each replay runs the pass."""

    made: list["Rerun"] = []
    replaying = False
    fails: list[Exception] = []

    def __init__(self, compute, tensors, pool, _stream):
        if Rerun.fails:
            raise Rerun.fails.pop(0)
        self.compute, self.tensors = compute, [tensor if tensor is None else graphs._like(tensor) for tensor in tensors]
        Rerun.made.append(self)

    def replay(self, tensors):
        if Rerun.fails:
            raise Rerun.fails.pop()
        for own, given in zip(self.tensors, tensors, strict=True):
            if own is not None:
                own.detach().copy_(given)
                own.grad = None
        Rerun.replaying = True
        found = self.compute(self.tensors)
        Rerun.replaying = False
        for own, given in zip(self.tensors, tensors, strict=True):
            if own is not None:
                given.grad = own.grad
        return found


class Pool:
    """Stands in for PyTorch's allocator: whether the stream allocates from a pool, and who still needs the pool."""

    open, users = False, 0

    def begin(self, _device, _pool):
        assert not self.open
        self.open, self.users = True, self.users + 1

    def end(self, _device, _pool):
        if not self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open = False

    def release(self, _device, _pool):
        self.users -= 1


@pytest.fixture
def gpu(monkeypatch):
    """What of a GPU passes ask for; the pool of its allocator."""
    stream, pool = types.SimpleNamespace(wait_stream=lambda other: None, device=GPU), Pool()
    answers = {"Stream": stream, "current_stream": stream, "graph_pool_handle": (0, 0), "current_device": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name in ("stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name, call in zip(POOL_CALLS, (pool.begin, pool.end, pool.release), strict=True):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", call, raising=False)
    monkeypatch.setattr(graphs, "unreserved_bytes", lambda device: 2 * graphs.LEFT_FREE)
    monkeypatch.setattr(graphs, "CapturedPass", Rerun)
    monkeypatch.setattr(Rerun, "made", [])
    monkeypatch.setattr(Rerun, "fails", [])
    return pool


def trained(base, tokenizer, text_encoder, log=None):
    """Losses of a training of all kinds of passes, what it learns, and the token's updates; with `log` as on a GPU."""
    parts = Parts(base, tokenizer, text_encoder)
    parts.wake_lora()
    plain = prompt_ids(tokenizer, parts.tokens, "a photo of a thing")
    parts.prompt_embeds.cache([plain, parts.empty_ids])
    rows = TokenOptimizer(parts.tokens.rows, 1e-3, NO_LIMIT)
    if log is not None:
        parts.passes = graphs.Passes(GPU, parts.transformer, log.append, 12)
    made = parts.steps(
        12,
        lora_optimizer=lora_optimizer("adamw", parts.lora, 1e-2),
        token_optimizer=rows,
        examples=[replace(example, preserved=(plain,)) for example in parts.examples],
        batch_size=2,
        caption_dropout=0.3,
        prior_preservation=2.0,
        prior_preservation_interval=2,
    )
    found = [(step.loss.item(), None if step.preservation is None else step.preservation.item()) for step in made]
    return found, [tensor.detach().clone() for tensor in (*parts.lora, parts.tokens.rows)], rows.steps


def assert_same(found, expected):
    assert found[0] == expected[0] and found[2] == expected[2]
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def test_captured_passes_train_the_same_and_each_shape_is_captured_once(gpu, base, tokenizer, text_encoder):
    log = []
    expected = trained(base, tokenizer, text_encoder)
    assert not Rerun.made
    assert_same(trained(base, tokenizer, text_encoder, log), expected)
    sizes = [tuple(None if t is None else (*t.shape, t.requires_grad) for t in made.tensors) for made in Rerun.made]
    kinds = [made.compute.args[0] for made in Rerun.made]
    assert len(sizes) == len(set(zip(kinds, sizes, strict=True))) > 4 and set(kinds) == {
        loop.flow_matching_losses,
        loop.preservation_losses,
    }
    assert not log


def test_gradients_stay_where_they_are_and_what_has_none_gets_none(gpu, base, tokenizer, text_encoder):
    parts, log = Parts(base, tokenizer, text_encoder), []
    parts.passes = graphs.Passes(GPU, parts.transformer, log.append)
    made = parts.steps(4, examples=parts.examples[:1])
    next(made)
    kept = [parameter.grad for parameter in parts.lora]
    assert None in kept  # what the last block sends as text is not read
    for _ in made:
        assert all(parameter.grad is gradient for parameter, gradient in zip(parts.lora, kept, strict=True))
    assert len(Rerun.made) == 1
    Rerun.fails.append(RuntimeError("replayed"))
    parts.passes.capturing = False
    list(parts.steps(3, examples=parts.examples[:1]))


def test_steps_that_cannot_be_captured_go_on_with_one_warning(gpu, base, tokenizer, text_encoder):
    log, first = [], RuntimeError("operation not permitted when stream is capturing")
    error = RuntimeError("operation failed due to a previous error")
    error.__context__ = first
    Rerun.fails.extend([error, error])
    assert_same(trained(base, tokenizer, text_encoder, log), trained(base, tokenizer, text_encoder))
    assert log == [f"Warning: the steps could not be captured as CUDA graphs ({first}): the training goes on without"]
    assert not Rerun.made and Rerun.fails  # it was tried once


@pytest.mark.parametrize(("most", "steps_a_graph", "captured"), [(2, 100, 2), (1, 4, 3)])
def test_only_so_many_shapes_are_captured_and_a_line_says_so(
    most, steps_a_graph, captured, gpu, monkeypatch, base, tokenizer, text_encoder
):
    log = []
    monkeypatch.setattr(graphs, "MAX_GRAPHS", most)
    monkeypatch.setattr(graphs, "STEPS_A_GRAPH", steps_a_graph)
    assert_same(trained(base, tokenizer, text_encoder, log), trained(base, tokenizer, text_encoder))
    assert len(Rerun.made) == captured
    assert log == [f"CUDA graphs: {captured} shapes of images and prompts are captured, others run without"]


def test_graphs_that_were_dropped_leave_room_for_others(gpu, monkeypatch, base, tokenizer, text_encoder):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    parts = Parts(base, tokenizer, text_encoder)
    parts.passes = graphs.Passes(GPU, parts.transformer, print)
    made = parts.steps(30, caption_dropout=0.5)
    for _ in range(20):
        next(made)
    assert len(Rerun.made) == 1
    parts.passes.release()
    for _ in made:
        pass
    assert len(Rerun.made) == 2


def test_graphs_leave_some_memory_and_a_line_says_so(gpu, monkeypatch, base, tokenizer, text_encoder):
    log = []
    monkeypatch.setattr(graphs, "unreserved_bytes", lambda device: graphs.LEFT_FREE - (len(Rerun.made) == 3))
    assert_same(trained(base, tokenizer, text_encoder, log), trained(base, tokenizer, text_encoder))
    assert log == ["CUDA graphs: 3 shapes of images and prompts are captured, others run without"]


@pytest.mark.parametrize(("free", "times"), [(0, 4), (10**10, 1)])
def test_what_follows_the_last_step_has_the_memory_of_graphs_and_samples_where_they_need_it(
    free, times, monkeypatch, dataset, base, tmp_path
):
    forgotten = []
    monkeypatch.setattr("placeholder.report.samples.unreserved_bytes", lambda device: free)
    monkeypatch.setattr(graphs.Passes, "release", lambda passes: forgotten.append(passes))
    config = TrainConfig(**SHORT | {"steps": 4, "sample_every": 2, "report": True})
    train(dataset, config, tmp_path / "weights.zip", base)
    assert len(forgotten) == times  # two times samples, the end of training, the grid


def test_without_memory_graphs_go_first_then_blocks_are_checkpointed_then_nothing_is_captured(
    gpu, monkeypatch, base, tokenizer, text_encoder
):
    parts, log, replay = Parts(base, tokenizer, text_encoder), [], Rerun.replay
    expected = [step.loss.item() for step in parts.steps(13, examples=parts.examples[:1])]
    parts.passes = graphs.Passes(GPU, parts.transformer, log.append)
    made, found = parts.steps(13, examples=parts.examples[:1]), []

    def step(checkpointed: int, captures: int) -> None:
        found.append(next(made))
        assert (found[-1].checkpointed, len(Rerun.made)) == (checkpointed, captures)

    step(0, 0)
    step(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Rerun, "replay", lambda *_: raise_(torch.OutOfMemoryError("CUDA out of memory")))
        step(0, 1)  # repeated, dropped, and repeated without
    step(0, 1)
    step(0, 2)  # captured again after twice as many passes
    parts.passes.release()
    Rerun.fails.append(RuntimeError("CUDA error: out of memory"))  # as CUDA says it, in a capture
    step(0, 2)
    waiting = "CUDA graphs dropped: out of memory; from here on a shape is captured after {} passes"
    assert Rerun.replay is replay and log == [SHARED, waiting.format(2), waiting.format(4)]
    for errors, checkpointed in ((1, 1), (2, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "_forward_and_backward", out_of_memory_at_first(errors))
            step(checkpointed, 2)
    assert log[3:] == ["Warning: the steps could not be captured as CUDA graphs (out of memory): the training goes on without"]
    assert [step.loss.item() for step in (*found, *made)] == expected


def out_of_memory_at_first(times: int):
    """The pass, which runs out of memory so many times before."""
    original, left = graphs._forward_and_backward, [1] * times

    def run(*arguments):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    return run


SHARED = "CUDA graphs: out of memory; passes that are not captured use the memory of the graphs from here on"


@pytest.mark.parametrize("fits", [True, False])
def test_passes_without_memory_beside_graphs_run_in_the_memory_of_those(fits, gpu, monkeypatch, base, tokenizer, text_encoder):
    log = []

    class Crowded(Denoiser):
        def __call__(self, *arguments):
            if parts.passes.holds_memory and not Rerun.replaying and not (fits and gpu.open):
                crowded.append(1)
                assert len(crowded) < 20
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(*arguments)

    def losses(make) -> list[float]:
        nonlocal parts
        parts = Parts(base, tokenizer, text_encoder)
        parts.denoiser, parts.passes = Crowded(parts.transformer), make(parts.transformer)
        parts.prompt_embeds.cache([parts.empty_ids])
        steps = list(parts.steps(60, batch_size=2, caption_dropout=0.2))
        assert not any(step.checkpointed for step in steps)
        return [step.loss.item() for step in steps]

    parts, crowded = None, []
    expected = losses(lambda transformer: graphs.Passes(torch.device("cpu"), transformer, log.append))
    assert losses(lambda transformer: graphs.Passes(GPU, transformer, log.append)) == expected
    assert log[0] == SHARED and not gpu.open and gpu.users == 0
    if fits:
        assert len(log) == len(crowded) == 1 and len(Rerun.made) > 2
    else:
        assert log[1:] and all(line.startswith("CUDA graphs dropped: out of memory") for line in log[1:])


@pytest.mark.skipif(torch.version.cuda is None, reason="a build of PyTorch without CUDA")
def test_pytorch_has_the_calls_that_choose_a_pool():
    assert all(hasattr(torch._C, f"_cuda_{name}") for name in POOL_CALLS)


def test_the_memory_of_a_capture_that_failed_is_given_back(gpu, monkeypatch, base, tokenizer, text_encoder):
    log = []

    class Invalid(Rerun):
        def __init__(self, *arguments):
            gpu.begin(0, (0, 0))  # and torch 2.11 does not end it
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "CapturedPass", Invalid)
    assert_same(trained(base, tokenizer, text_encoder, log), trained(base, tokenizer, text_encoder))
    assert len(log) == 1 and not gpu.open and gpu.users == 0


def test_a_graph_reads_no_rotary_embedding_that_a_cache_may_drop(gpu, base, tokenizer, text_encoder):
    parts = Parts(base, tokenizer, text_encoder)
    arguments = {"video_fhw": [[(1, 4, 4)]], "device": torch.device("cpu"), "max_txt_seq_len": 5}
    image, text = parts.transformer.pos_embed(**arguments)
    cached = parts.transformer.pos_embed._compute_video_freqs
    assert cached(1, 4, 4, 0, arguments["device"]) is cached(1, 4, 4, 0, arguments["device"])
    graphs.Passes(GPU, parts.transformer, print)
    anew = parts.transformer.pos_embed._compute_video_freqs
    assert anew(1, 4, 4, 0, arguments["device"]) is not anew(1, 4, 4, 0, arguments["device"])
    assert all(torch.equal(*pair) for pair in zip(parts.transformer.pos_embed(**arguments), (image, text), strict=True))


def raise_(error: Exception) -> None:
    raise error

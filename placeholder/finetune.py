"""A whole training: a job in, a verified weights archive out."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from placeholder.config import OPTIONS, TOKEN, TrainConfig
from placeholder.devices import deterministic, free_memory, peak_bytes, reset_peak
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.errors import Log
from placeholder.job import Job, Stop
from placeholder.lora.adapter import load_lora, lora_metadata, lora_state_dict
from placeholder.model.base import BaseModel
from placeholder.report.report import Report
from placeholder.report.samples import grid_prompts
from placeholder.report.trackers import WandbTracker, show_step
from placeholder.training.checkpoint import Checkpoint, CheckpointWriter, prepare_folder
from placeholder.training.context import Context, Training, checkpoint_facts, compiles, schedule, with_seed
from placeholder.training.diagnostics import diagnose
from placeholder.training.flow import MIDDLE_SIGMA
from placeholder.training.loop import Step, TrainState, train_steps
from placeholder.training.progress import Progress
from placeholder.training.resume import read_start, resume_path, resumed_config
from placeholder.training.setup import prepare
from placeholder.transformer.compile import compiled_blocks, uncompiled
from placeholder.weights.archive import Weights, add_files, content_digest, read_weights, write_weights
from placeholder.weights.metadata import modelspec, training_meta

Observer = Callable[[Step], None]  # shows or keeps what a training does; the loop knows none of them


def finetune(
    job: Job,
    base: BaseModel,
    log: Log = print,
    processes: Processes = SINGLE_PROCESS,
    stop: Stop | None = None,
) -> dict[str, Any] | None:
    """Do the job on the base model, and write its weights archive; returns what meta.json holds.

    Where `stop` is wanted, a last checkpoint is left and StoppedError raised. Of several processes the first alone writes and
    returns, the others return None.
    Raises ValueError for a bad data set, token or start before any weight is loaded, and RuntimeError without room for the
    archive, when the loss stops being finite, or when the archive cannot be verified.
    """
    stop = stop or Stop()
    context, shared = resolve(job, base, log, processes)
    started = {"started_from": content_digest(job.resume_from)} if isinstance(context.start, Weights) else {}
    config, first = context.config, processes.rank == 0
    with ExitStack() as stack:
        tracker = stack.enter_context(WandbTracker(job.tracker if first else None, log))
        tracker.start(config, shared)
        stack.enter_context(deterministic(base.device, config.deterministic))
        reset_peak()
        training = prepare(job.dataset, context, grid_prompts)
        if first:
            check_disk(job.output, training.state)
        start = context.start if isinstance(context.start, Checkpoint) else None
        progress = Progress(config.steps, training.tokens, log, training.state.step, start and start.facts["progress"])
        report = Report(training, context, lambda: stop.wanted) if config.report and first else None
        observers: list[Observer] = [progress.step, *([report.step] if report else [])]
        if job.tracker and first:
            observers.append(partial(show_step, tracker, training, config, progress, report))
        if job.checkpoints and first:
            made_by = partial(checkpoint_facts, training, config, progress, shared)
            observers.append(CheckpointWriter(job.checkpoints, training.state, made_by, log, stop).step)
        stop.heeded = job.checkpoints is not None  # in every process: the last checkpoint needs all of them for its step
        train(training, context, progress, observers)
        stop.heeded = False
        if not first:
            return None
        meta, diagnostics = results(training, context, progress, shared)
        meta |= started
        if report:
            report.end()
        grid = ("\n".join(training.shown_prompts), report.grid) if report and report.grid else None
        tracker.end(config.steps, meta, grid)
        files = partial(report.files, progress.curve, meta, diagnostics) if report else dict
        write_verified(job.output, training, meta, context, files)
        return meta


def resolve(job: Job, base: BaseModel, log: Log, processes: Processes) -> tuple[Context, dict[str, Any]]:
    """The context of the training with its resolved configuration, and the facts that a resumed training has to share."""
    config = job.config
    source = resume_path(job.resume_from) if job.resume_from else None
    start = read_start(source) if source else None
    shared = {"base_model": base.source, "base_model_revision": base.revision, "processes": processes.world_size}
    if processes.world_size > 1:  # each machine has its own files
        processes.check_same("resume_from", source and content_digest(source))
        processes.check_same("the options", repr(config))  # not-a-number, too, is the same as itself there
        processes.check_same("the base model", not Path(base.source).is_dir() and (base.source, base.revision))
    if start is not None:
        config = resumed_config(start, config, shared)
    config, *_ = processes.all_gather([with_seed(config, log)])  # with the seed of the first process
    config = replace(config, torch_compile=compiles(config, base.device))
    if job.checkpoints is not None and processes.rank == 0:
        prepare_folder(job.checkpoints, source)
        log(f"Checkpoints: every {job.checkpoints.every} steps")
    token_options = [name for name, declared in OPTIONS.items() if declared.heading == TOKEN]
    given = [name for name in token_options if getattr(config, name) != getattr(TrainConfig(), name)]
    if given and not config.tokens:
        log(f"Not used, since no placeholder token is trained: {', '.join(given)}")
    return Context(config, base, log, processes, start), shared


def check_disk(output: Path, state: TrainState) -> None:
    """Raise RuntimeError where the disk has no room for the LoRA in bf16, before it is trained."""
    needed, free = 2 * sum(parameter.numel() for parameter in state.lora), shutil.disk_usage(output.parent).free
    if free < needed:
        raise RuntimeError(
            f"the disk of {output.parent} has {free / 1e6:.0f} MB free, the archive needs {needed / 1e6:.0f} MB: make room, or "
            "name another output"
        )


def train(training: Training, context: Context, progress: Progress, observers: list[Observer]) -> None:
    """Make all steps, and show each to the observers."""
    state = training.state
    with compiled_blocks(state.transformer, context.config.torch_compile, context.log) as state.compiled:
        for step in progress.timed(train_steps(state, schedule(context.config), context.processes)):
            with uncompiled():
                for observer in observers:
                    observer(step)
    state.passes.release()  # the memory is needed for what follows
    free_memory()


def results(
    training: Training, context: Context, progress: Progress, shared: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What meta.json holds, and the lines of the diagnostics."""
    config, data, chosen = context.config, training.data, training.plan.chosen
    figures = progress.figures() | shared | {"base_model_revision": context.base.commit}
    context.timing.seconds["steps"] = figures["training_seconds"]
    lines: list[str] = []
    if config.tokens:
        diagnostics = diagnose(training)
        lines = diagnostics.lines()
        figures |= diagnostics.meta()
    for line in lines:
        context.log(line)
    expected, peak = chosen.peak(training.state.checkpointing.checkpointed), peak_bytes()
    if peak is not None:
        context.log(f"Memory: peak {peak / 1e9:.1f} GB, {expected / 1e9:.1f} GB expected")
    figures |= {"expected_peak_gb": expected / 1e9, "peak_gb": None if peak is None else peak / 1e9}
    found = {
        "transformer_storage": chosen.quantization,
        "modulations_tabled": chosen.tabled,
        "images": data.report.images,
        "captions_found": data.report.captions_found,
        "captions_described": sum(caption.source == "auto" for caption in data.captions),
        "buckets": data.report.buckets,
        "dataset_digest": data.digest,
    }
    return training_meta(config, training.tokens.ids, found, figures), lines


def write_verified(
    output: Path, training: Training, meta: dict[str, Any], context: Context, files: Callable[[], dict[str, bytes]]
) -> None:
    """Write the archive, with the report's `files`, whole and verified or not at all."""
    transformer = training.state.transformer
    weights = Weights(lora_state_dict(transformer), training.tokens.embeddings(), meta)
    unverified = output.with_name(f"{output.name}.unverified")
    try:
        with context.timing.part("save"):
            write_weights(unverified, weights, lora_metadata(transformer), modelspec(meta))
        add_files(unverified, files())
        verify_archive(unverified, weights, training.state)
        unverified.replace(output)
    finally:
        unverified.unlink(missing_ok=True)
    context.log(
        f"Weights archive verified: {len(weights.lora)} LoRA tensors, {len(weights.embeddings)} embeddings, "
        f"{output.stat().st_size} bytes"
    )


@torch.no_grad()
def verify_archive(path: Path, trained: Weights, state: TrainState) -> None:
    """Read the archive again and compare it with what was trained; takes the LoRA off the transformer.

    Raises RuntimeError unless the embeddings and the LoRA come back bit for bit, every LoRA key is applied to the transformer,
    and the transformer's output changes by it.
    """
    stored = read_weights(path)
    for what, found, expected in (("embedding", stored.embeddings, trained.embeddings), ("LoRA", stored.lora, trained.lora)):
        if found.keys() != expected.keys() or any(not torch.equal(value, found[key]) for key, value in expected.items()):
            raise RuntimeError(f"the archive does not hold the {what} that was trained")
    example, transformer = state.sampler.examples[0], state.transformer

    def velocity() -> Tensor:
        embeds = state.prompt_embeds([example.input_ids])
        latents = example.latents[None].to(state.denoiser.device)
        return state.denoiser(latents, state.denoiser.timesteps(torch.full((1,), MIDDLE_SIGMA)), embeds, example.grid)

    transformer.unload_lora()
    without = velocity()
    load_lora(transformer, stored.lora)
    with_lora = velocity()
    transformer.unload_lora()
    if not torch.isfinite(with_lora).all() or torch.equal(without, with_lora):
        raise RuntimeError(
            "the stored LoRA does not change what the transformer predicts: train for more steps or at a higher rate"
        )

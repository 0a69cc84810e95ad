"""A whole training: data set and configuration in, a proven weights archive out."""

import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from placeholder.config import TrainConfig
from placeholder.devices import peak_bytes, reset_peak
from placeholder.distributed import SINGLE_PROCESS, Processes
from placeholder.errors import MAX_SEED
from placeholder.job import CheckpointFolder, Job
from placeholder.lora.adapter import load_lora, lora_metadata, lora_state_dict, unload_lora
from placeholder.model.base import BaseModel
from placeholder.report.report import Report
from placeholder.report.trackers import WandbTracker, step_scalars
from placeholder.tokens.prompt_encoder import PromptEmbeddings
from placeholder.training.checkpoint import Checkpoint, prepare_folder, write_checkpoint
from placeholder.training.diagnostics import Diagnostics, diagnose
from placeholder.training.examples import Example
from placeholder.training.flow import MIDDLE_SIGMA
from placeholder.training.losses import predict_velocity
from placeholder.training.progress import Record
from placeholder.training.resume import config_of, read_start, resume_path
from placeholder.training.setup import Log, prepare
from placeholder.training.timing import Timing
from placeholder.training.training import Training
from placeholder.training.training_state import capture
from placeholder.transformer.compile import compiled_steps
from placeholder.weights.archive import Weights, add_files, content_digest, read_weights, write_weights
from placeholder.weights.metadata import modelspec, training_meta


class StoppedError(RuntimeError):
    """A training that was asked to end before its last step."""


@dataclass
class Stop:
    """A training that leaves checkpoints ends after its present step once this is `wanted`, as long as it is `heeded`."""

    wanted: bool = False
    heeded: bool = False


def finetune(
    job: Job,
    base: BaseModel,
    log: Log = print,
    processes: Processes = SINGLE_PROCESS,
    stop: Stop | None = None,
    tracker: WandbTracker | None = None,
) -> dict[str, Any] | None:
    """Do the job on the base model, and write its weights archive; returns what meta.json holds.

    Where `stop` is wanted, a last checkpoint
    is left and StoppedError raised. `tracker` is started, and shows the training. Of several processes the first alone writes and returns,
    the others return None, and have no `tracker`.
    Raises ValueError for a bad data set, token or start before any weight is loaded, and RuntimeError when the loss stops being
    finite or the archive does not prove itself.
    """
    config, checkpoints = job.config, job.checkpoints
    source = resume_path(job.resume_from) if job.resume_from else None
    start = read_start(source) if source else None
    shared = {"base_model": base.source, "base_model_revision": base.revision, "processes": processes.world_size}
    if processes.world_size > 1:  # each machine has its own files
        processes.check_same("a start in resume_from", source and content_digest(source))
        processes.check_same("options", repr(config))  # not-a-number, too, is the same as itself there
        processes.check_same("a base model", not Path(base.source).is_dir() and (base.source, base.revision))
    if start is not None:
        config = config_of(start, config, shared)
    config = processes.broadcast(with_seed(config, log))
    if checkpoints is not None and processes.rank == 0:
        prepare_folder(checkpoints, source)
        log(f"Checkpoints: every {checkpoints.every} steps")
    if config.placeholder_token and not config.tokens:
        log(f"Placeholder token '{','.join(config.placeholder_token)}' is not used: train_placeholder_token is false")
    if tracker is not None:
        tracker.start(config, shared)
    reset_peak()
    timing = Timing()
    training = prepare(job.dataset, config, base, log, processes, start, timing)
    if config.torch_compile is None:
        config = replace(config, torch_compile=training.payback.pays)
    earlier = start.facts["record"] if isinstance(start, Checkpoint) else None
    record = Record(config.steps, training.tokens, log, training.position.step, earlier)
    stop = stop or Stop()
    stop.heeded = checkpoints is not None
    report = None
    if config.report and processes.rank == 0:
        report = Report(training, base, config, log, timing, lambda: stop.wanted)
        report.start()
    with compiled_steps(
        training.train_state, training.examples, training.empty_ids, config, training.payback.one_shape, log
    ) as compile_seconds:
        record.start += compile_seconds
        for step in training.steps(config, processes):
            record.note(step)
            if report is not None:
                before = timing.seconds.get("samples", 0.0)
                report.step(step)
                record.start += timing.seconds.get("samples", 0.0) - before  # meanwhile the other processes wait for this one
            if tracker is not None:
                point = record.curve[-1]
                scalars = step_scalars(step.number, config, training, point) if point.step == step.number else {}
                tracker.step(step.number, scalars, report.samples.get(step.number, []) if report else [])
            if checkpoints is None or processes.rank > 0:
                continue
            stopping = stop.wanted
            if stopping or step.number % checkpoints.every == 0:
                saved = _save(checkpoints, training, shared | {"config": asdict(config), "record": record.facts()}, log)
            if stopping:
                last = "its checkpoint" if saved else "the newest checkpoint that could be written"
                raise StoppedError(f"the training was stopped after step {step.number}: resume_from takes {last}")
    stop.heeded = False
    if processes.rank > 0:
        return None
    figures = record.figures() | shared | {"base_model_revision": base.commit}
    if compile_seconds:
        timing.seconds["compile"] = compile_seconds
    timing.seconds["steps"] = figures["training_seconds"]
    diagnostics = _diagnostics(training, log) if config.tokens else None
    if diagnostics is not None:
        figures |= diagnostics.meta()
    figures |= _memory(training, log) | {"compile_seconds": compile_seconds or None}
    if isinstance(start, Weights):
        figures["started_from"] = content_digest(source)
    meta = training_meta(config, training, figures)
    if report is not None:
        report.end()
    if tracker is not None:
        grid = ("\n".join(training.prompts), report.grid) if report and report.grid else None
        tracker.end(config.steps, meta, grid)
    transformer = training.train_state.transformer
    weights = Weights(lora_state_dict(transformer), training.tokens.embeddings(), meta)
    unproved = job.output.with_name(f"{job.output.name}.unproved")
    try:
        with timing.part("save"):
            write_weights(unproved, weights, lora_metadata(transformer), modelspec(meta))
        if report is not None:
            add_files(unproved, report.files(record.curve, meta, diagnostics.lines() if diagnostics else []))
        prove_archive(unproved, weights, transformer, training.prompt_embeds, training.examples[0])
        unproved.replace(job.output)
    finally:
        unproved.unlink(missing_ok=True)
    log(
        f"Weights archive proved: {len(weights.lora)} LoRA tensors, {len(weights.embeddings)} embeddings, "
        f"{job.output.stat().st_size} bytes"
    )
    return meta


def with_seed(config: TrainConfig, log: Log) -> TrainConfig:
    """The configuration with the seed that the run really uses."""
    drawn = config.seed is None
    config = replace(config, seed=secrets.randbelow(MAX_SEED + 1)) if drawn else config
    log(f"Seed: {config.seed}{' (drawn)' if drawn else ''}")
    return config


def _save(checkpoints: CheckpointFolder, training: Training, facts: dict[str, Any], log: Log) -> bool:
    """Leave a checkpoint, and say whether it is there; a disk that is full costs the checkpoint, not the training."""
    step = training.position.step
    tensors, state = capture(training.train_state, training.position)
    facts |= {"dataset_digest": training.dataset_digest, "transformer_storage": training.plan.chosen.storage}
    facts |= {"modulations_tabled": training.plan.chosen.tabled}
    facts |= {"descriptions": training.descriptions}
    try:
        write_checkpoint(checkpoints, step, tensors, facts | {"step": step, "state": state})
    except OSError as error:
        log(f"Warning: the checkpoint of step {step} could not be written ({error}): the training goes on without it")
        return False
    log(f"Checkpoint: step {step}")
    return True


def _memory(training: Training, log: Log) -> dict[str, Any]:
    """Gigabytes at the height of the training: as planned, and as they were on a GPU."""
    expected, found = training.plan.chosen.peak(training.train_state.checkpointing.checkpointed), peak_bytes()
    if found is not None:
        log(f"Memory: {found / 1e9:.1f} GB at the height, {expected / 1e9:.1f} GB expected")
    return {"expected_peak_gb": expected / 1e9, "peak_gb": None if found is None else found / 1e9}


def _diagnostics(training: Training, log: Log) -> Diagnostics:
    vocabulary = training.prompt_embeds.text_encoder.embed_tokens.weight
    found = diagnose(
        training.train_state, training.tokens, training.initial_rows, training.examples, vocabulary, training.tokenizer
    )
    for line in found.lines():
        log(line)
    return found


@torch.no_grad()
def prove_archive(
    path: Path, trained: Weights, transformer: QwenImageTransformer2DModel, prompt_embeds: PromptEmbeddings, example: Example
) -> None:
    """Open the archive again and hold it against what was trained; takes the LoRA off the transformer.

    Raises RuntimeError unless the rows and the LoRA come back bit for bit, every LoRA key is applied to the transformer, and
    the transformer's output changes by it.
    """
    stored = read_weights(path)
    if stored.embeddings.keys() != trained.embeddings.keys() or any(
        not torch.equal(rows, stored.embeddings[token]) for token, rows in trained.embeddings.items()
    ):
        raise RuntimeError("the archive does not hold the embedding that was trained")
    if stored.lora.keys() != trained.lora.keys() or any(
        not torch.equal(value, stored.lora[key]) for key, value in trained.lora.items()
    ):
        raise RuntimeError("the archive does not hold the LoRA that was trained")

    def velocity() -> Tensor:
        sigmas = torch.full((1,), MIDDLE_SIGMA)
        embeds = prompt_embeds([example.input_ids])
        return predict_velocity(transformer, example.latents[None].to(transformer.device), sigmas, embeds, example.grid)

    unload_lora(transformer)
    without = velocity()
    load_lora(transformer, stored.lora)
    with_lora = velocity()
    unload_lora(transformer)
    if not torch.isfinite(with_lora).all() or torch.equal(without, with_lora):
        raise RuntimeError(
            "the stored LoRA does not change what the transformer predicts: train for more steps or at a higher rate"
        )

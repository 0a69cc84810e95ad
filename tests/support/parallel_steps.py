"""Started by torchrun from test_launch.py: trains for twenty steps and stores what this process then holds, in fp32.

Then it trains again while the last process runs out of memory, once and for good, and stores what that came to.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.model.base import BaseModel
from placeholder.training import exchange
from placeholder.training import loop as trainer
from placeholder.training import memory_plan as plan
from placeholder.training import setup as prepare_module
from placeholder.training.setup import prepare

CONFIG = TrainConfig(
    steps=20,
    rank=4,
    resolution=(64,),
    learning_rate=1e-3,
    caption_dropout=0.3,
    train_placeholder_token=True,
    placeholder_token=("<zwx>",),
    prior_preservation=1.0,
    prior_preservation_interval=2,
    seed=1,
)


def trained(dataset: Path, config: TrainConfig, base: BaseModel, processes: Processes) -> dict[str, torch.Tensor]:
    """LoRA and rows after the steps, and of all steps the losses and the number of blocks checkpointed."""
    training = prepare(dataset, config, base, log=lambda line: None)
    losses, checkpointed = [], []
    for step in training.steps(config, processes):
        losses.append(torch.stack([step.loss, step.loss if step.preservation is None else step.preservation]))
        checkpointed.append(step.checkpointed)
    state = {str(number): parameter.detach().clone() for number, parameter in enumerate(training.train_state.lora)}
    state |= {"rows": training.tokens.rows.detach().clone(), "losses": torch.stack(losses)}
    return state | {"checkpointed": torch.tensor(checkpointed)}


@contextmanager
def running_out(module, name: str, calls) -> Iterator[None]:
    """Let a function run out of CUDA memory in the calls of these numbers."""
    original, made = getattr(module, name), []

    def called(*args, **options):
        made.append(name)
        if len(made) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **options)

    setattr(module, name, called)
    try:
        yield
    finally:
        setattr(module, name, original)


def message(work) -> str:
    """What a failure says, after its kind."""
    try:
        work()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        return f"ValueError: {error}"
    return "nothing"


def main(dataset: Path, base: BaseModel, folder: Path) -> None:
    prepare_module.load_tokenizer = cache(prepare_module.load_tokenizer)  # these two take longer than the steps
    plan.training_needs = cache(plan.training_needs)
    processes = Processes.from_environment()
    last = processes.rank == processes.world_size - 1
    save_file(trained(dataset, CONFIG, base, processes), folder / f"{processes.rank}.safetensors")
    # The second preservation pass of the fourth step: gradients of the first passes are there already.
    with running_out(trainer, "preservation_losses", {4} if last else ()):
        save_file(trained(dataset, CONFIG, base, processes), folder / f"again-{processes.rank}.safetensors")
    told = {}
    with running_out(trainer, "sample_losses", range(3, 1000) if last else ()):
        told["every time"] = message(lambda: trained(dataset, CONFIG, base, processes))
    lora = [torch.nn.Parameter(torch.zeros(2))]
    with running_out(exchange.torch, "zeros", {1} if last else ()):
        told["exchange"] = message(lambda: exchange.GradientExchange(processes, lora, None))
    told["same"] = message(lambda: processes.check_same("options", CONFIG))
    told["other"] = message(lambda: processes.check_same("a data set", "other" if last else "first"))
    told["numbers"] = [
        processes.all_reduce_min(processes.rank),
        processes.all_reduce_max(processes.rank),
        *processes.all_gather([processes.rank]),
    ]
    told["broadcast"] = processes.broadcast(f"from {processes.rank}")
    (folder / f"{processes.rank}.json").write_text(json.dumps(told))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), BaseModel(sys.argv[2], torch.device("cpu"), torch.float32), Path(sys.argv[3]))

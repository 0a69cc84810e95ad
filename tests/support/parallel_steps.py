"""Started by torchrun from test_launch.py: trains for twenty steps and stores what this process then holds, in fp32.

Then it trains again while the last process runs out of memory, once and for good, and stores what that came to.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from placeholder.config import TrainConfig
from placeholder.distributed import Processes
from placeholder.model.base import BaseModel
from placeholder.training.context import Context, schedule
from placeholder.training.loop import train_steps
from placeholder.training.losses import Denoiser
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


class RunningOut(Denoiser):
    """Runs out of GPU memory in the calls of these numbers."""

    def __init__(self, transformer, calls):
        super().__init__(transformer)
        self.calls, self.count = calls, 0

    def __call__(self, *args):
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(*args)


def trained(
    dataset: Path, config: TrainConfig, base: BaseModel, processes: Processes, running_out=()
) -> dict[str, torch.Tensor]:
    """LoRA and token embeddings after the steps, and of all steps the losses and the number of checkpointed blocks."""
    training = prepare(dataset, Context(config, base, lambda line: None, processes))
    state, losses, checkpointed = training.state, [], []
    state.denoiser = RunningOut(state.transformer, running_out)
    for step in train_steps(state, schedule(config), processes):
        losses.append(torch.stack([step.loss, step.loss if step.preservation is None else step.preservation]))
        checkpointed.append(step.checkpointed)
    found = {str(number): parameter.detach().clone() for number, parameter in enumerate(state.lora)}
    found |= {"rows": training.tokens.rows.detach().clone(), "losses": torch.stack(losses)}
    return found | {"checkpointed": torch.tensor(checkpointed)}


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
    processes = Processes.from_environment()
    last = processes.rank == processes.world_size - 1
    save_file(trained(dataset, CONFIG, base, processes), folder / f"{processes.rank}.safetensors")
    # In the fourth step, when gradients of its first passes are there already.
    again = trained(dataset, CONFIG, base, processes, running_out={10} if last else ())
    save_file(again, folder / f"again-{processes.rank}.safetensors")
    told = {"every time": message(lambda: trained(dataset, CONFIG, base, processes, range(3, 1000) if last else ()))}
    told["same"] = message(lambda: processes.check_same("options", CONFIG))
    told["other"] = message(lambda: processes.check_same("the data set", "other" if last else "first"))
    told["ranks"] = processes.all_gather([processes.rank])
    (folder / f"{processes.rank}.json").write_text(json.dumps(told))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), BaseModel(sys.argv[2], torch.device("cpu"), torch.float32), Path(sys.argv[3]))

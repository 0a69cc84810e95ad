"""Started by torchrun from test_launch.py: trains for twenty steps and stores what this process then holds, in fp32."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from placeholder.config import TrainConfig
from placeholder.models import BaseModel
from placeholder.prepare import prepare
from placeholder.processes import Processes

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
    """LoRA and rows after the steps, and the losses of all steps."""
    training = prepare(dataset, config, base, log=lambda line: None)
    steps = training.steps(config, processes)
    losses = [torch.stack([step.loss, step.loss if step.preservation is None else step.preservation]) for step in steps]
    state = {str(number): parameter.detach().clone() for number, parameter in enumerate(training.trainee.lora)}
    return state | {"rows": training.tokens.rows.detach().clone(), "losses": torch.stack(losses)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = Processes.from_environment()
    base = BaseModel(sys.argv[2], torch.device("cpu"), torch.float32)
    state = trained(Path(sys.argv[1]), CONFIG, base, processes)
    save_file(state, Path(sys.argv[3]) / f"{processes.index}.safetensors")

"""Cog's training interface: inputs and output, nothing else. placeholder/service/launch.py starts the training."""

import pathlib
from typing import Optional

from cog import BaseModel, Input, Path, Secret

from placeholder.config import train_config
from placeholder.job import CheckpointFolder, Job, WandbTarget
from placeholder.service import launch
from placeholder.service.files import OutputFolder
from placeholder.service.metrics import record

# What is not an option of TrainConfig: files, and where things go.
WANDB = ("wandb_api_key", "wandb_project", "wandb_run", "wandb_entity")
FILES = ("dataset", "config", "resume_from", "checkpoint_folder", "checkpoint_every", "hf_repo_id", "hf_token", *WANDB)
OUTPUT = OutputFolder("placeholder-training-")


class TrainingOutput(BaseModel):
    weights: Path


def train(
    dataset: Path = Input(
        description="Zip or tar of jpg, png or webp images, each with a .txt caption of the same name where there is one."
    ),
    steps: int = Input(default=1000, ge=1, le=20000, description="Training steps."),
    rank: int = Input(
        default=32, ge=1, le=256, description="Rank of the LoRA: more can hold more detail and makes a larger archive."
    ),
    lora_rank: Optional[int] = Input(
        default=None, ge=1, le=256, description="Deprecated name of rank; counts where it is given.", deprecated=True
    ),
    learning_rate: float = Input(
        default=2e-4,
        ge=1e-6,
        le=1e-2,
        description="Learning rate of the LoRA. Not used by prodigy, which finds its own step size.",
    ),
    batch_size: int = Input(default=1, choices=[1, 2, 4], description="Pictures in a step."),
    resolution: str = Input(
        default="512,768,1024",
        description="Sides in pixels of the square areas to train at, from 64 to 2048, separated by commas. Each picture keeps its aspect ratio and is never enlarged.",
    ),
    default_caption: str = Input(
        default="A photo of a person named <>",
        description="Caption of pictures that have none. With a placeholder token, <> and [trigger] in any caption become the token.",
    ),
    autocaption: bool = Input(
        default=False,
        description="Have the base model's own text encoder describe the pictures that have no caption, in the place of default_caption. The captions stand in the archive's report, to be corrected.",
    ),
    autocaption_prefix: Optional[str] = Input(
        default=None,
        description="What stands in front of each description of autocaption, such as: a photo of <>, where the placeholder token takes the place of <>.",
    ),
    autocaption_suffix: Optional[str] = Input(
        default=None, description="What stands behind each description of autocaption, such as: 35mm photograph."
    ),
    caption_dropout: float = Input(
        default=0.05, ge=0.0, le=0.9, description="Share of the samples that are trained with an empty prompt."
    ),
    train_placeholder_token: Optional[bool] = Input(
        default=None,
        description="Train a fresh zero-prior token together with the LoRA. Left blank, it is on when placeholder_token is given.",
    ),
    placeholder_token: Optional[str] = Input(
        default=None,
        description="The new token, in angle brackets, such as <zwx>; several are separated by commas. <zwx> where the training of a token is on and none is named.",
    ),
    placeholder_vectors: int = Input(
        default=1,
        ge=1,
        le=64,
        description="Rows of each new token: more can hold more of a subject, and take more of the prompt's 512 tokens.",
    ),
    placeholder_init_std: float = Input(
        default=1e-5,
        ge=0.0,
        le=1.0,
        description="Standard deviation of the new embedding at the start. 0 is allowed: exactly zero.",
    ),
    placeholder_learning_rate: float = Input(default=1e-3, ge=0.0, le=1.0, description="Learning rate of the new embedding."),
    placeholder_warmup_fraction: float = Input(
        default=0.0,
        ge=0.0,
        le=0.9,
        description="Share of the steps, at the start, in which the new embedding learns alone; then the LoRA joins in.",
    ),
    prior_preservation: float = Input(
        default=4.0,
        ge=0.0,
        le=10.0,
        description="With a placeholder token: how strongly captions without the token, and the empty prompt, keep drawing what the base model draws. 0 turns it off.",
    ),
    prior_preservation_interval: int = Input(
        default=4,
        ge=1,
        le=100,
        description="prior_preservation acts in every n-th step; such a step takes about four times as long.",
    ),
    class_word: str = Input(
        default="",
        description="What stands in the token's place in the captions that prior_preservation keeps, such as person. Blank: nothing, which suits captions such as: a photo of a <zwx> dog.",
    ),
    optimizer: str = Input(
        default="adamw",
        choices=["adamw", "adamw8bit", "adam8bit", "prodigy"],
        description="Optimizer of the LoRA. The new embedding is always trained with AdamW without weight decay.",
    ),
    quantize: bool = Input(
        default=False,
        description="Store the transformer's weights in 8 bits while training, or in 4 where 8 do not fit: less memory, slower.",
    ),
    quantize_te: bool = Input(
        default=False, description="Hold the text encoder's weights in 8 bits. Not possible together with a placeholder token."
    ),
    torch_compile: Optional[bool] = Input(
        default=None,
        description="Compile the transformer's blocks: faster steps after some minutes. Left blank, it is on where that pays back by far.",
    ),
    log_prompt_ids: bool = Input(default=False, description="Log the token ids of every caption."),
    seed: Optional[int] = Input(
        default=None,
        ge=0,
        le=4294967295,
        description="Seed of everything random. Left blank, one is drawn, logged and stored in the archive.",
    ),
    report: bool = Input(
        default=True,
        description="Put a report into the archive: curves, pictures before and after, the data set, the configuration, for a browser.",
    ),
    sample_every: int = Input(
        default=0,
        ge=0,
        le=20000,
        description="Draw sample pictures for the report in every n-th step, at most 200 times in a training. 0: none.",
    ),
    sample_prompts: str = Input(
        default="",
        description="Prompts of the report's pictures, one a line, at most 8. Blank: the first captions.",
    ),
    resume_from: Optional[Path] = Input(
        default=None,
        description="Go on from a checkpoint, from the newest in a folder of them, or start from an earlier weights.zip.",
    ),
    checkpoint_folder: Optional[str] = Input(
        default=None,
        description="Folder on the training machine for checkpoints, from which resume_from goes on. Blank: none are written.",
    ),
    checkpoint_every: Optional[int] = Input(
        default=None,
        ge=1,
        le=20000,
        description="Steps from one checkpoint to the next. Left blank, a tenth of all, but at least 50. The newest two are kept.",
    ),
    hf_repo_id: Optional[str] = Input(
        default=None,
        description="Repository on the Hugging Face hub, owner/name, to which the LoRA, the embedding and a model card are uploaded. A new one is private.",
    ),
    hf_token: Optional[Secret] = Input(default=None, description="Token of the Hugging Face hub that may write to hf_repo_id."),
    wandb_api_key: Optional[Secret] = Input(
        default=None,
        description="API key of Weights & Biases, to show there the losses, the norm of the token's row and the samples while it trains.",
    ),
    wandb_project: Optional[str] = Input(
        default=None, description="Project on Weights & Biases. Blank: qwen-image-lora, where a key is given."
    ),
    wandb_run: Optional[str] = Input(
        default=None, description="Name of the run on Weights & Biases. Blank: one is drawn there."
    ),
    wandb_entity: Optional[str] = Input(
        default=None, description="User or team on Weights & Biases. Blank: the default one of the key."
    ),
    config: Optional[Path] = Input(
        default=None,
        description="YAML file with the sections train, debug and model; what it names overrules the other inputs.",
    ),
) -> TrainingOutput:
    """Train a LoRA, and optionally a new token, on the images; returns the weights archive."""
    inputs = dict(locals())
    dataset, config_file, resume_from, checkpoint_folder, checkpoint_every, hf_repo_id, hf_token, wandb_key, *wandb = map(
        inputs.pop, FILES
    )
    options = train_config(inputs, config_file)
    checkpoints = CheckpointFolder.of(checkpoint_folder, checkpoint_every, options.steps)
    target = WandbTarget.of(wandb_key.get_secret_value() if wandb_key else None, *wandb)
    if not dataset:
        raise ValueError("dataset is missing: give a zip or tar of jpg, png or webp pictures")
    repository = None
    if hf_repo_id or hf_token:
        from placeholder.report.hub import HubRepository  # here, because it imports torch: see launch.py

        repository = HubRepository.of(hf_repo_id, hf_token.get_secret_value() if hf_token else None)
        repository.check()
    with OUTPUT.fresh() as folder:
        weights = folder / "weights.zip"
        start = pathlib.Path(resume_from) if resume_from else None
        launch.train(Job(pathlib.Path(dataset), options, weights, start, checkpoints, target), print)
        if repository:
            repository.upload(weights, print)
        record("training_step_count", options.steps)
        return TrainingOutput(weights=Path(weights))

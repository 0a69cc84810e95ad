"""Cog's training interface: inputs and output, nothing else. placeholder/service/launch.py starts the training."""

from typing import Optional

from cog import BaseModel, Input, Path, Secret, current_scope

from placeholder.job import Job
from placeholder.report.hub import HubRepository
from placeholder.service import launch
from placeholder.service.files import OutputFolder

OUTPUT = OutputFolder("placeholder-training-")


class TrainingOutput(BaseModel):
    weights: Path


def train(
    dataset: Path = Input(
        description="Zip or tar of images, optionally with captions in .txt files of the same names or in metadata.jsonl.",
    ),
    steps: int = Input(default=1000, ge=1, le=20000, description="Training steps."),
    rank: int = Input(
        default=32,
        ge=1,
        le=256,
        description="Rank of the LoRA; alpha is the same. A higher rank can hold more detail and makes a larger archive.",
    ),
    lora_rank: Optional[int] = Input(
        default=None, ge=1, le=256, description="Deprecated name of rank; used instead of it where given.", deprecated=True
    ),
    learning_rate: float = Input(
        default=2e-4,
        ge=1e-6,
        le=1e-2,
        description="Learning rate of the LoRA. Not used by prodigy, which finds its own step size.",
    ),
    batch_size: int = Input(default=1, choices=[1, 2, 4], description="Images per step, on each GPU."),
    resolution: str = Input(
        default="512,768,1024",
        description="Training resolutions, 64 to 2048, comma-separated: a crop has about the area of a square of that side.",
    ),
    default_caption: str = Input(
        default="A photo of a person named <>",
        description="Caption of images without one. In captions <>, [trigger] and [name] become the placeholder token.",
    ),
    autocaption: bool = Input(
        default=False,
        description="Describe images without a caption with the base model's text encoder, instead of default_caption.",
    ),
    autocaption_prefix: Optional[str] = Input(
        default=None,
        description="Text in front of each autocaption, such as: a photo of <>, where <> becomes the placeholder token.",
    ),
    autocaption_suffix: Optional[str] = Input(
        default=None, description="Text after each autocaption, such as: 35mm photograph."
    ),
    caption_dropout: float = Input(
        default=0.05, ge=0.0, le=0.9, description="Share of the samples that are trained with an empty prompt."
    ),
    train_placeholder_token: Optional[bool] = Input(
        default=None,
        description="Train a zero-prior placeholder token with the LoRA. Blank: on when placeholder_token is given.",
    ),
    placeholder_token: Optional[str] = Input(
        default=None,
        description="Placeholder token, such as <zwx>; several are separated by commas. Blank: <zwx> where one is trained.",
    ),
    placeholder_vectors: int = Input(
        default=1,
        ge=1,
        le=64,
        description="Embedding vectors per token: more can hold more of a subject and take more of the prompt's 512 tokens.",
    ),
    placeholder_init_std: float = Input(
        default=1e-5,
        ge=0.0,
        le=1.0,
        description="Standard deviation of the new token embedding at the start. 0 is allowed: exactly zero.",
    ),
    placeholder_learning_rate: float = Input(default=1e-3, ge=0.0, le=1.0, description="Learning rate of the token embedding."),
    placeholder_warmup_fraction: float = Input(
        default=0.0,
        ge=0.0,
        le=0.9,
        description="Share of the steps, at the start, that train the token embedding alone, without the LoRA.",
    ),
    token_gate: bool = Input(
        default=True,
        description="Train for predict's token gate. Off: for tools without it; prior_preservation is then 4 unless given.",
    ),
    prior_preservation: Optional[float] = Input(
        default=None,
        ge=0.0,
        le=10.0,
        description="Weight of the loss that keeps prompts without the token as before. Blank: 0; without token_gate 4.",
    ),
    prior_preservation_interval: int = Input(
        default=4,
        ge=1,
        le=100,
        description="Apply prior_preservation every n steps; such a step takes about four times as long.",
    ),
    class_word: str = Input(
        default="",
        description="What the subject is, such as dog: for autocaption, and instead of the token in prior_preservation.",
    ),
    optimizer: str = Input(
        default="adamw",
        choices=["adamw", "adamw8bit", "adam8bit", "prodigy"],
        description="Optimizer of the LoRA. The token embedding always uses AdamW without weight decay.",
    ),
    quantize: bool = Input(
        default=False,
        description="Quantize the transformer while training, to int8, or nf4 where int8 does not fit: less memory, slower.",
    ),
    quantize_te: bool = Input(
        default=False, description="Quantize the text encoder to int8. Not possible with a placeholder token."
    ),
    torch_compile: Optional[bool] = Input(
        default=None,
        description="Compile the transformer's blocks: faster steps after some minutes. Blank: on a GPU from 2000 steps on.",
    ),
    deterministic: bool = Input(
        default=False,
        description="Use only deterministic GPU algorithms: the same seed gives the same weights on the same GPU. Slower.",
    ),
    log_prompt_ids: bool = Input(default=False, description="Log the token ids of every caption."),
    seed: Optional[int] = Input(
        default=None,
        ge=-1,
        le=4294967295,
        description="Random seed. Blank or -1: one is drawn, logged and stored in the archive.",
    ),
    report: bool = Input(
        default=True,
        description="Put a report into the archive: curves, images before and after, the data set, the configuration.",
    ),
    sample_every: int = Input(
        default=0,
        ge=0,
        le=20000,
        description="Generate sample images for the report every n steps, at most 200 times. 0: never.",
    ),
    sample_prompts: str = Input(
        default="",
        description="Prompts of the report's images, one a line, at most 8. Blank: the first captions.",
    ),
    resume_from: Optional[Path] = Input(
        default=None,
        description="Checkpoint to resume from, a folder of them for the newest, or an earlier weights.zip to start from.",
    ),
    checkpoint_folder: Optional[str] = Input(
        default=None,
        description="Folder on the training machine for checkpoints, to resume from. Blank: none are written.",
    ),
    checkpoint_every: Optional[int] = Input(
        default=None,
        ge=1,
        le=20000,
        description="Steps from one checkpoint to the next. Blank: a tenth of all, at least 50. The newest two are kept.",
    ),
    hf_repo_id: Optional[str] = Input(
        default=None,
        description="Hugging Face repository, owner/name, for the LoRA, embedding and model card. A new one is private.",
    ),
    hf_token: Optional[Secret] = Input(
        default=None, description="Token of the Hugging Face Hub with write access to hf_repo_id."
    ),
    wandb_api_key: Optional[Secret] = Input(
        default=None,
        description="API key of Weights & Biases: shows losses, the norm of the token embedding and samples while it trains.",
    ),
    wandb_project: Optional[str] = Input(
        default=None, description="Project on Weights & Biases. Blank: qwen-image-lora, where a key is given."
    ),
    wandb_run: Optional[str] = Input(default=None, description="Name of the run on Weights & Biases. Blank: chosen there."),
    wandb_entity: Optional[str] = Input(
        default=None, description="User or team on Weights & Biases. Blank: the default of the key."
    ),
    config: Optional[Path] = Input(
        default=None,
        description="YAML file with the sections train, debug and model; its values override the other inputs.",
    ),
) -> TrainingOutput:
    """Train a LoRA, and optionally a new token, on the images; returns the weights archive."""
    inputs = dict(locals())
    inputs |= {name: inputs[name].get_secret_value() for name in ("hf_token", "wandb_api_key") if inputs[name]}
    with OUTPUT.fresh() as folder:
        job = Job.of(inputs, folder / "weights.zip")
        repository = HubRepository.of(hf_repo_id, inputs["hf_token"])
        if repository:
            repository.check()
        launch.train(job, print)
        if repository:
            repository.upload(job.output, print)
        current_scope().record_metric("training_step_count", job.config.steps)
        return TrainingOutput(weights=Path(job.output))

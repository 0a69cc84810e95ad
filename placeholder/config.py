"""The options of a training: declared once with default, range and help, read from inputs and a YAML file, checked."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from placeholder.errors import shown
from placeholder.options import (
    DRAWN,
    MAX_SEED,
    NUMERIC,
    TOKENS,
    Flag,
    Number,
    Option,
    Text,
    Tokens,
    Whole,
    checked,
    is_blank,
    option,
    options_class,
    options_of,
    read_sections,
)

SIGNS = r"<>|\[trigger\]|\[name\]"  # the places of the token in a text; those in square brackets are ai-toolkit's
OPTIMIZERS = ("adamw", "adamw8bit", "adam8bit", "prodigy")
BATCH_SIZES = (1, 2, 4)
MAX_STEPS = 20_000
MAX_VECTORS = 64  # embedding vectors of one token
MIN_SIDE, MAX_SIDE = 64, 2048  # pixels
DEFAULT_PLACEHOLDER = "<zwx>"
DEFAULT_CAPTION = "A photo of a person named <>"
WITHOUT_TOKEN = {DEFAULT_CAPTION: "A photo of a person"}  # what a training without a token takes for it
UNGATED_PRESERVATION = 4.0  # the weight that docs/study.md found for images without the token gate
MAX_SAMPLE_PROMPTS, MAX_SAMPLE_ROUNDS = 8, 200  # all samples travel in the archive
# The headings of --help.
LORA, TOKEN, CAPTIONS, SPEED, REPORT = "LoRA", "placeholder token", "captions", "memory and speed", "report"


def _sides(value: Any) -> Any:
    """`"512,768,1024"`, a number, or a list of numbers, as a list."""
    return value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]


def _few_lines(value: Any) -> Any:
    """A few lines of text, also as a list, as text."""
    text = "\n".join(value) if isinstance(value, list) and all(isinstance(line, str) for line in value) else value
    if isinstance(text, str) and sum(bool(line.strip()) for line in text.splitlines()) > MAX_SAMPLE_PROMPTS:
        raise ValueError("too many prompts")
    return text


Side = Annotated[Whole, Field(ge=MIN_SIDE, le=MAX_SIDE)]
Sides = Annotated[
    tuple[Side, ...], Field(min_length=1), BeforeValidator(_sides), AfterValidator(lambda s: tuple(sorted(set(s))))
]
SIDES = f"give whole numbers from {MIN_SIDE} to {MAX_SIDE}, separated by commas"
Words = Annotated[Text | None, AfterValidator(lambda text: text if text and text.strip() else None)]
Prompts = Annotated[Text, BeforeValidator(_few_lines)]
PROMPTS = f"give at most {MAX_SAMPLE_PROMPTS} prompts, one a line"


@options_class
class TrainConfig:
    """The resolved options of one training.

    `resolution` holds sides in pixels, ascending. `placeholder_token` holds the named tokens, which are trained only where
    `train_placeholder_token` is on. `seed` None: one is drawn. `torch_compile` None: see `compiles`, or as the checkpoint.
    """

    steps: Annotated[Whole, option(LORA, "train", ge=1, le=MAX_STEPS, resume_may_change=True)] = 1000
    """Training steps."""
    rank: Annotated[Whole, option(LORA, "train", ge=1, le=256)] = 32
    """Rank of the LoRA; alpha is the same. A higher rank can hold more detail and makes a larger archive."""
    learning_rate: Annotated[Number, option(LORA, "train", ge=1e-6, le=1e-2)] = 2e-4
    """Learning rate of the LoRA. Not used by prodigy, which finds its own step size."""
    batch_size: Annotated[Literal[*BATCH_SIZES], NUMERIC, option(LORA, "train")] = 1
    """Images per step, on each GPU."""
    resolution: Annotated[Sides, option(LORA, "train", accepts=SIDES)] = (512, 768, 1024)
    """Training resolutions, 64 to 2048, comma-separated: a crop has about the area of a square of that side."""
    default_caption: Annotated[Text, option(CAPTIONS, "train")] = DEFAULT_CAPTION
    """Caption of images without one. In captions <>, [trigger] and [name] become the placeholder token."""
    autocaption: Annotated[Flag, option(CAPTIONS, "train")] = False
    """Describe images without a caption with the base model's text encoder, instead of default_caption."""
    autocaption_prefix: Annotated[Words, option(CAPTIONS, "train")] = None
    """Text in front of each autocaption, such as: a photo of <>, where <> becomes the placeholder token."""
    autocaption_suffix: Annotated[Words, option(CAPTIONS, "train")] = None
    """Text after each autocaption, such as: 35mm photograph."""
    caption_dropout: Annotated[Number, option(CAPTIONS, "train", ge=0.0, le=0.9)] = 0.05
    """Share of the samples that are trained with an empty prompt."""
    train_placeholder_token: Annotated[Flag, option(TOKEN, "train", blank=True)] = False
    """Train a zero-prior placeholder token with the LoRA. Blank: on when placeholder_token is given."""
    placeholder_token: Annotated[Tokens, option(TOKEN, "train", accepts=TOKENS)] = ()
    """Placeholder token, such as <zwx>; several are separated by commas. Blank: <zwx> where one is trained."""
    placeholder_vectors: Annotated[Whole, option(TOKEN, "train", ge=1, le=MAX_VECTORS)] = 1
    """Embedding vectors per token: more can hold more of a subject and take more of the prompt's 512 tokens."""
    placeholder_init_std: Annotated[Number, option(TOKEN, "train", ge=0.0, le=1.0)] = 1e-5
    """Standard deviation of the new token embedding at the start. 0 is allowed: exactly zero."""
    placeholder_learning_rate: Annotated[Number, option(TOKEN, "train", ge=0.0, le=1.0)] = 1e-3
    """Learning rate of the token embedding."""
    placeholder_warmup_fraction: Annotated[Number, option(TOKEN, "train", ge=0.0, le=0.9)] = 0.0
    """Share of the steps, at the start, that train the token embedding alone, without the LoRA."""
    token_gate: Annotated[Flag, option(TOKEN, "train")] = True
    """Train for predict's token gate. Off: for tools without it; prior_preservation is then 4 unless given."""
    prior_preservation: Annotated[Number, option(TOKEN, "train", blank=True, ge=0.0, le=10.0)] = 0.0
    """Weight of the loss that keeps prompts without the token as before. Blank: 0; without token_gate 4."""
    prior_preservation_interval: Annotated[Whole, option(TOKEN, "train", ge=1, le=100)] = 4
    """Apply prior_preservation every n steps; such a step takes about four times as long."""
    class_word: Annotated[Text, option(TOKEN, "train")] = ""
    """What the subject is, such as dog: for autocaption, and instead of the token in prior_preservation."""
    optimizer: Annotated[Literal[*OPTIMIZERS], option(LORA, "train")] = "adamw"
    """Optimizer of the LoRA. The token embedding always uses AdamW without weight decay."""
    quantize: Annotated[Flag, option(SPEED, "model")] = False
    """Quantize the transformer while training, to int8, or nf4 where int8 does not fit: less memory, slower."""
    quantize_te: Annotated[Flag, option(SPEED, "model")] = False
    """Quantize the text encoder to int8. Not possible with a placeholder token."""
    torch_compile: Annotated[Flag | None, option(SPEED, "model")] = None
    """Compile the transformer's blocks: faster steps after some minutes. Blank: on a GPU from 2000 steps on."""
    deterministic: Annotated[Flag, option(SPEED, "model")] = False
    """Use only deterministic GPU algorithms: the same seed gives the same weights on the same GPU. Slower."""
    log_prompt_ids: Annotated[Flag, option(CAPTIONS, "debug", resume_may_change=True)] = False
    """Log the token ids of every caption."""
    seed: Annotated[Whole | None, option(LORA, "train", ge=-1, le=MAX_SEED), DRAWN] = None
    """Random seed. Blank or -1: one is drawn, logged and stored in the archive."""
    report: Annotated[Flag, option(REPORT, "train", resume_may_change=True)] = True
    """Put a report into the archive: curves, images before and after, the data set, the configuration."""
    sample_every: Annotated[Whole, option(REPORT, "train", ge=0, le=MAX_STEPS, resume_may_change=True)] = 0
    """Generate sample images for the report every n steps, at most 200 times. 0: never."""
    sample_prompts: Annotated[Prompts, option(REPORT, "train", accepts=PROMPTS, resume_may_change=True)] = ""
    """Prompts of the report's images, one a line, at most 8. Blank: the first captions."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens that are trained: none in the baseline."""
        return self.placeholder_token if self.train_placeholder_token else ()

    @property
    def preserves(self) -> bool:
        """Whether prior preservation is on."""
        return bool(self.tokens) and self.prior_preservation > 0

    @property
    def training_mode(self) -> str:
        """`zero_prior` with a placeholder token, `baseline` without."""
        return "zero_prior" if self.train_placeholder_token else "baseline"


LORA_RANK = replace(options_of(TrainConfig)["rank"], name="lora_rank", default=None, blank=True, deprecated=True)  # hosted name
OPTIONS: dict[str, Option] = options_of(TrainConfig) | {
    "lora_rank": replace(LORA_RANK, description="Deprecated name of rank; used instead of it where given.")
}
# The sections of the YAML file; every option stands in exactly one.
YAML_SECTIONS: dict[str, tuple[str, ...]] = {
    section: tuple(name for name, declared in OPTIONS.items() if declared.section == section)
    for section in ("train", "debug", "model")
}


def train_config(inputs: dict[str, Any], config_file: Path | str | None = None) -> TrainConfig:
    """The configuration that the inputs ask for, overridden by the options of a YAML file.

    `inputs` holds options by their input names. A placeholder token is trained where `train_placeholder_token` is on or, left
    blank, where `placeholder_token` is given. Raises ValueError, one sentence, for any value that is not accepted.
    """
    from_file = read_sections(config_file, YAML_SECTIONS) if config_file else {}
    options: dict[str, Any] = {}
    for source in (inputs, from_file):
        given = {name: value for name, value in source.items() if not is_blank(value)}
        if "lora_rank" in given:
            given["rank"] = given.pop("lora_rank")
        options |= given
    named = bool(options.get("placeholder_token"))
    if options.setdefault("train_placeholder_token", named) and not named:
        options["placeholder_token"] = DEFAULT_PLACEHOLDER
    config = checked(TrainConfig, options)
    if config.tokens and not config.token_gate and "prior_preservation" not in options:
        config = replace(config, prior_preservation=UNGATED_PRESERVATION)
    _check_together(config)
    return config


def _check_together(config: TrainConfig) -> None:
    """Raise ValueError for options that exclude each other."""
    if config.train_placeholder_token and config.quantize_te:
        raise ValueError(
            "quantize_te cannot be combined with a placeholder token: the embedding of a quantized text encoder cannot learn; "
            "set quantize_te to false or train without the token"
        )
    if not config.report and (config.sample_every or config.sample_prompts):
        raise ValueError("sample_every and sample_prompts make images for the report, which is off: set report to true")
    if config.sample_every and config.steps // config.sample_every > MAX_SAMPLE_ROUNDS:
        raise ValueError(
            f"sample_every is {config.sample_every}: with {config.steps} steps give at least "
            f"{-(-config.steps // MAX_SAMPLE_ROUNDS)}, or 0 for no samples"
        )
    if re.search("|".join([SIGNS, *map(re.escape, filter(None, config.tokens))]), config.class_word, re.IGNORECASE):
        raise ValueError(f"class_word {shown(config.class_word)} holds the token: give what the base model knows, such as dog")
    for name in ("autocaption_prefix", "autocaption_suffix"):
        if getattr(config, name) is not None and not config.autocaption:
            raise ValueError(f"{name} is put around the captions of autocaption, which is off: set autocaption to true")


def config_yaml(config: TrainConfig) -> str:
    """The configuration as the YAML file that the input `config` takes.

    Read again it is equal to `config`, but that U+0085, a line break of YAML, becomes a space or a line feed.
    """
    options = asdict(config) | {
        "resolution": list(config.resolution),
        "placeholder_token": ",".join(config.placeholder_token) or None,
    }
    sections = {section: {name: options[name] for name in names if name in options} for section, names in YAML_SECTIONS.items()}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)

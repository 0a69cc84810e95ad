"""What a training run is asked to do: every option with its default, read from inputs and YAML, validated once."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from placeholder.errors import MAX_SEED, choice, flag, label, number, reason, shown, text, whole

OPTIMIZERS = ("adamw", "adamw8bit", "adam8bit", "prodigy")
BATCH_SIZES = (1, 2, 4)
MAX_STEPS = 20_000
MAX_VECTORS = 64  # rows one token may have
MIN_SIDE, MAX_SIDE = 64, 2048  # pixels
DEFAULT_PLACEHOLDER = "<zwx>"
MAX_CONFIG_BYTES = 64 * 1024
MAX_SAMPLE_PROMPTS, MAX_SAMPLE_ROUNDS = 8, 200  # all samples travel in the archive

# The sections of the YAML file; every option of TrainConfig stands in exactly one.
YAML_SECTIONS: dict[str, tuple[str, ...]] = {
    "train": (
        "steps",
        "rank",
        "lora_rank",
        "learning_rate",
        "batch_size",
        "resolution",
        "default_caption",
        "autocaption",
        "autocaption_prefix",
        "autocaption_suffix",
        "caption_dropout",
        "train_placeholder_token",
        "placeholder_token",
        "placeholder_vectors",
        "placeholder_init_std",
        "placeholder_learning_rate",
        "placeholder_warmup_fraction",
        "prior_preservation",
        "prior_preservation_interval",
        "class_word",
        "optimizer",
        "seed",
        "report",
        "sample_every",
        "sample_prompts",
    ),
    "debug": ("log_prompt_ids",),
    "model": ("quantize", "quantize_te", "torch_compile"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The resolved options of one run.

    `caption_dropout` is the share of the samples that train the empty prompt. `resolution` holds the sides of the square areas trained at, in pixels; `placeholder_token` holds the tokens named, which
    are used only where `train_placeholder_token` is on; `seed` None means that one is to be drawn, `torch_compile` None that the rule of payback.py decides; `sample_every` 0 means never, `sample_prompts` holds one prompt a line.
    """

    steps: int = 1000
    rank: int = 32
    learning_rate: float = 2e-4
    batch_size: int = 1
    resolution: tuple[int, ...] = (512, 768, 1024)
    default_caption: str = "A photo of a person named <>"
    autocaption: bool = False
    autocaption_prefix: str | None = None
    autocaption_suffix: str | None = None
    caption_dropout: float = 0.05
    train_placeholder_token: bool = False
    placeholder_token: tuple[str, ...] = ()
    placeholder_vectors: int = 1
    placeholder_init_std: float = 1e-5
    placeholder_learning_rate: float = 1e-3
    placeholder_warmup_fraction: float = 0.0
    prior_preservation: float = 4.0
    prior_preservation_interval: int = 4
    class_word: str = ""
    optimizer: str = "adamw"
    quantize: bool = False
    quantize_te: bool = False
    torch_compile: bool | None = None
    log_prompt_ids: bool = False
    seed: int | None = None
    report: bool = True
    sample_every: int = 0
    sample_prompts: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens that are trained: none in the baseline."""
        return self.placeholder_token if self.train_placeholder_token else ()

    @property
    def preserves(self) -> bool:
        """Whether the class word and the empty prompt are held to what the base model draws for them."""
        return bool(self.tokens) and self.prior_preservation > 0

    @property
    def training_mode(self) -> str:
        """`zero_prior` with a placeholder token, `baseline` without."""
        return "zero_prior" if self.train_placeholder_token else "baseline"


def train_config(inputs: dict[str, Any], config_file: Path | str | None = None) -> TrainConfig:
    """The configuration that Cog's inputs ask for, overruled by what a YAML file names.

    `inputs` holds the options by their input names; `lora_rank` None, `train_placeholder_token` None, `placeholder_token`
    None, `torch_compile` None and `seed` None mean "not given". Raises ValueError, one sentence, for any value that is not accepted.
    """
    options = dict(inputs)
    from_file = read_yaml(config_file) if config_file else {}
    if "rank" in from_file:
        options["lora_rank"] = None
    options |= from_file
    lora_rank = options.pop("lora_rank", None)
    if lora_rank is not None:
        options["rank"] = lora_rank
    train, named = options.pop("train_placeholder_token", None), options.pop("placeholder_token", None)
    checked = {name: CHECKS[name](name, value) for name, value in options.items()}
    config = TrainConfig(**checked, **_placeholder_options(train, named))
    if config.train_placeholder_token and config.quantize_te:
        raise ValueError(
            "quantize_te cannot be combined with a placeholder token: the embedding of a quantized text encoder cannot learn; "
            "set quantize_te to false or train without the token"
        )
    _check_samples(config)
    _check_autocaption(config)
    return config


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The options that a YAML file with the sections train, debug and model names, flattened."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {label(path.name or str(path))} is not a file: give a YAML file")
    content = path.read_bytes()
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"config is {len(content)} bytes: a configuration file has at most {MAX_CONFIG_BYTES}")
    try:
        document = _PlainLoader(content.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # also an impossible date or number
        raise ValueError(f"config is not a YAML file: {reason(error)}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError(f"config holds a {type(document).__name__}: expected the sections {', '.join(YAML_SECTIONS)}")
    options: dict[str, Any] = {}
    for section, entries in document.items():
        if section not in YAML_SECTIONS:
            raise ValueError(f"config has an unknown section {shown(section)}: known are {', '.join(YAML_SECTIONS)}")
        if not isinstance(entries, dict | None):
            raise ValueError(f"config section {section} holds a {type(entries).__name__}: expected option names with values")
        for name, value in (entries or {}).items():
            if name not in YAML_SECTIONS[section]:
                known = "; ".join(f"{part}: {', '.join(names)}" for part, names in YAML_SECTIONS.items())
                raise ValueError(f"config has an unknown key {section}.{_key(name)}: known are {known}")
            options[name] = value
    return options


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags and aliases: a tag can fail in any way, and aliases within merge keys grow without bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("tags (!name) and aliases (*name) are not read, write the value itself")
        return super().compose_node(parent, index)


def _key(name: Any) -> str:
    return label(name) if isinstance(name, str) else shown(name)


def _placeholder_options(train: Any, named: Any) -> dict[str, Any]:
    """Whether a placeholder token is trained, and which: on when asked for or, left blank, when a token is named."""
    train = named is not None if train is None else flag("train_placeholder_token", train)
    if train and named is None:
        named = DEFAULT_PLACEHOLDER
    tokens = () if named is None else tuple(token.strip(" ") for token in text("placeholder_token", named).split(","))
    return {"train_placeholder_token": train, "placeholder_token": tokens}


def _check_samples(config: TrainConfig) -> None:
    if not config.report and (config.sample_every or config.sample_prompts):
        raise ValueError("sample_every and sample_prompts draw pictures for the report, which is off: set report to true")
    if config.sample_every and config.steps // config.sample_every > MAX_SAMPLE_ROUNDS:
        raise ValueError(
            f"sample_every is {config.sample_every}: with {config.steps} steps give at least "
            f"{-(-config.steps // MAX_SAMPLE_ROUNDS)}, or 0 for no samples"
        )


def _check_autocaption(config: TrainConfig) -> None:
    for name in ("autocaption_prefix", "autocaption_suffix"):
        if getattr(config, name) is not None and not config.autocaption:
            raise ValueError(f"{name} is put around descriptions that autocaption makes, which is off: set autocaption to true")


def _words(name: str, value: Any) -> str | None:
    """Text; None where nothing or only white space is given."""
    return None if value is None or not text(name, value).strip() else value


def _sample_prompts(name: str, value: Any) -> str:
    """Text of at most MAX_SAMPLE_PROMPTS lines that are not blank."""
    lines = [line for line in text(name, value).splitlines() if line.strip()]
    if len(lines) > MAX_SAMPLE_PROMPTS:
        raise ValueError(f"{name} has {len(lines)} prompts: give at most {MAX_SAMPLE_PROMPTS}, one a line")
    return value


def _resolutions(name: str, value: Any) -> tuple[int, ...]:
    """`"512,768,1024"`, a number, or a list of numbers, as sorted sides in pixels."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    sides = set()
    for part in parts:
        digits = str(part).strip() if isinstance(part, str) or type(part) is int and 0 < part <= MAX_SIDE else ""
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 4 and MIN_SIDE <= int(digits) <= MAX_SIDE):
            raise ValueError(f"{name} is {shown(value)}: give whole numbers from {MIN_SIDE} to {MAX_SIDE}, separated by commas")
        sides.add(int(digits))
    return tuple(sorted(sides))


# How each option is checked; the ranges are those of the inputs' descriptions.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "steps": lambda name, value: whole(name, value, 1, MAX_STEPS),
    "rank": lambda name, value: whole(name, value, 1, 256),
    "learning_rate": lambda name, value: number(name, value, 1e-6, 1e-2),
    "batch_size": lambda name, value: choice(name, value, BATCH_SIZES),
    "resolution": _resolutions,
    "default_caption": text,
    "autocaption": flag,
    "autocaption_prefix": _words,
    "autocaption_suffix": _words,
    "caption_dropout": lambda name, value: number(name, value, 0.0, 0.9),
    "placeholder_vectors": lambda name, value: whole(name, value, 1, MAX_VECTORS),
    "placeholder_init_std": lambda name, value: number(name, value, 0.0, 1.0),
    "placeholder_learning_rate": lambda name, value: number(name, value, 0.0, 1.0),
    "placeholder_warmup_fraction": lambda name, value: number(name, value, 0.0, 0.9),
    "prior_preservation": lambda name, value: number(name, value, 0.0, 10.0),
    "prior_preservation_interval": lambda name, value: whole(name, value, 1, 100),
    "class_word": text,
    "optimizer": lambda name, value: choice(name, value, OPTIMIZERS),
    "quantize": flag,
    "quantize_te": flag,
    "torch_compile": lambda name, value: None if value is None else flag(name, value),
    "log_prompt_ids": flag,
    "seed": lambda name, value: None if value is None else whole(name, value, 0, MAX_SEED),
    "report": flag,
    "sample_every": lambda name, value: whole(name, value, 0, MAX_STEPS),
    "sample_prompts": _sample_prompts,
}


def config_yaml(config: TrainConfig) -> str:
    """The resolved configuration as the input `config` takes it; with it the same training can be made again."""
    options = asdict(config) | {
        "resolution": list(config.resolution),
        "placeholder_token": ",".join(config.placeholder_token) or None,
    }
    sections = {section: {name: options[name] for name in names if name in options} for section, names in YAML_SECTIONS.items()}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)

"""Captions by the base model's own text encoder: for which images, with which instruction, and shared by the processes."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.buckets import to_image
from placeholder.data.dataset import Photo
from placeholder.distributed import Processes
from placeholder.errors import Log
from placeholder.model.captioner import MAX_NEW_TOKENS, describe

DRAFT_WORDS, DRAFT_MENTIONS = " a" * MAX_NEW_TOKENS, 3  # one id a word; about as often a token is named in two sentences
PROGRESS_LINES = 10
# Instructions for the captioning model; docs/captions.md quotes them.
SENTENCES = (
    "Describe the setting, the light and the framing. Name only what can be seen. Answer with one or two plain sentences and "
    "begin with the description itself, without words such as 'The image shows'."
)
INSTRUCTION = f"Write a caption for this image: what it shows and what happens in it. {SENTENCES}"
SUBJECT_INSTRUCTION = (
    "Write a caption for this image. {subject} is called {name}: write {name} wherever you mention it, and say nothing of "
    "what {name} itself looks like. Describe what may be different in another image of {name}: the pose, what {name} does, "
    f"clothing, other things around. {SENTENCES}"
)


def undescribed(photos: list[Photo], config: TrainConfig) -> list[Photo]:
    """The images that autocaption is to describe."""
    return [photo for photo in photos if photo.caption is None] if config.autocaption else []


def draft(config: TrainConfig) -> str:
    """The longest description there may be, for the memory plan and for checks before the descriptions are made."""
    return " ".join(_meant(config)[:1] * DRAFT_MENTIONS) + DRAFT_WORDS


def check_autocaption(config: TrainConfig) -> None:
    """Raise ValueError where nothing says which of several tokens an image without a caption shows."""
    if config.tokens and not _meant(config):
        raise ValueError(
            f"autocaption cannot tell which of {', '.join(config.tokens)} an image shows: name one in autocaption_prefix or "
            "autocaption_suffix, or write a .txt caption next to each image"
        )


def _meant(config: TrainConfig) -> list[str]:
    """The tokens that may be meant where there is no caption: the only one, or those that prefix or suffix names."""
    around = f"{config.autocaption_prefix or ''} {config.autocaption_suffix or ''}"
    return [token for token in config.tokens if len(config.tokens) == 1 or token in around]


def instruction(config: TrainConfig) -> str:
    """The instruction to the captioning model: with a token, describe what varies, and call the subject by the token.

    Of several tokens that is the first one that autocaption_prefix or autocaption_suffix names.
    """
    named = _meant(config)
    if not named:
        return INSTRUCTION
    class_word = " ".join(config.class_word.split())
    subject = f"Its main subject, a {class_word}," if class_word else "Its main subject"
    return SUBJECT_INSTRUCTION.format(subject=subject, name=named[0])


def describe_photos(
    vlm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    photos: list[Photo],
    config: TrainConfig,
    processes: Processes,
    log: Log,
    describe: Callable[..., str] = describe,
) -> list[str]:
    """A description of each image, made from its largest crop; several processes share the work, and all get all of it."""
    text = instruction(config)
    log(f"Autocaption: {len(photos)} images are described; the instruction: {text}")
    share = processes.shard(list(enumerate(photos)))
    every, found = max(1, -(-len(share) // PROGRESS_LINES)), []
    by = " by this process" if processes.world_size > 1 else ""
    for done, (number, photo) in enumerate(share, 1):
        image = to_image(max(photo.crops, key=Tensor.numel))
        found.append((number, describe(vlm, tokenizer, image, text)))
        if done % every == 0 or done == len(share):
            log(f"Autocaption: {done} of {len(share)} images described{by}")
    return [description for _, description in sorted(processes.all_gather(found))]
